"""Every command of the command line, and the shell programs in front of it."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

from self1e import cli
from self1e.cli import COMMANDS, FOR_DEVELOPERS, main
from self1e.errors import UserError


@pytest.mark.parametrize("command", ["eval vqa", *(name for name in COMMANDS | FOR_DEVELOPERS if name != "eval")])
def test_every_command_has_a_help_of_its_own(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    assert capsys.readouterr().out.startswith(f"usage: self1e {command}")


def test_commands_are_listed(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS | FOR_DEVELOPERS)
    assert main([]) == main(["segmnt"]) == main(["eval"]) == 2
    assert "'segmnt'" in capsys.readouterr().err


@pytest.fixture
def raising(monkeypatch):
    """`raising(error)` makes every command raise it."""

    def set_error(error: BaseException) -> None:
        class Module:
            @staticmethod
            def main(argv):
                raise error

        monkeypatch.setattr(cli.importlib, "import_module", lambda name: Module)

    return set_error


def test_what_a_user_got_wrong_is_one_line(raising, capsys):
    raising(UserError("a.csv: no column 'mask'; add it"))
    assert main(["segment"]) == 1 and capsys.readouterr().err.strip() == "error: a.csv: no column 'mask'; add it"


def test_ctrl_c_is_130(raising, capsys):
    raising(KeyboardInterrupt())
    assert main(["segment"]) == 130 and capsys.readouterr().err.strip() == "interrupted"


def test_only_who_reads_the_output_may_leave(raising):
    raising(BrokenPipeError("a data worker's"))
    with pytest.raises(BrokenPipeError):
        main(["segment"])
    reading, writing = os.pipe()
    os.close(reading)
    program = "from self1e import cli; cli.run_program = lambda _: print('a figure'); exit(cli.main(['score']))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == 1 and not done.stderr


def test_eval_takes_the_folder_of_a_run(tmp_path, monkeypatch):
    called = []

    class Module:
        @staticmethod
        def main(argv):
            called.append(argv)
            return 0

    run = tmp_path / "mine"
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: Module)
    with pytest.raises(UserError, match="mine"):
        cli.evaluate(["segmentation", str(run)])
    with pytest.raises(UserError, match="typo"):
        cli.evaluate(["vqa", str(tmp_path / "typo"), "--version", "v"])
    (run / "ckpt_model").mkdir(parents=True)
    assert cli.evaluate(["segmentation", str(run), "--workers", "0"]) == 0
    assert cli.evaluate(["vqa", str(run), "--dynamic"]) == 0
    named = ["--log_base_dir", str(tmp_path), "--exp_name", "mine"]
    assert called[0] == ["--eval_only", "--eval_all_datasets", "--workers", "0", *named]
    assert called[1] == ["--dynamic", *named]


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """`shell("eval_all.sh", ...)` runs a shell program whose Python only prints what it is called with."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && echo 1 && exit\necho "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(python))
    return lambda *command: subprocess.run(["bash", *command], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("program", "kind"), [("eval_all.sh", "segmentation"), ("eval_vqas.sh", "vqa")])
def test_shell_programs_start_the_evaluation(shell, program, kind):
    assert shell(program, "runs/a b").stdout == f"-m self1e eval {kind} runs/a b\n"
    words = "--version v --exp_name e"
    assert shell(program, *words.split()).stdout == f"-m self1e eval {kind} {words}\n"
    several = shell(program, "runs/a", "--num_processes", "2").stdout
    assert several == f"-m torch.distributed.run --standalone --nproc_per_node 2 -m self1e eval {kind} runs/a\n"
    assert shell(program, "--help").stdout == f"-m self1e eval {kind} --help\n"
    for wrong in ([], ["runs/a", "--num_processes", "x"]):
        done = shell(program, *wrong)
        assert done.returncode == 2 and not done.stdout and done.stderr


@pytest.mark.parametrize("program", ["eval_all.sh", "eval_vqas.sh"])
def test_a_bare_shell_program_reads_its_variables(shell, program, tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/evaluate.sh").write_text((ROOT / "scripts/evaluate.sh").read_text())
    (tmp_path / program).write_text((ROOT / program).read_text().replace('EXP_NAME=""', 'EXP_NAME="mine"'))
    assert " --exp_name mine" in shell(str(tmp_path / program)).stdout
