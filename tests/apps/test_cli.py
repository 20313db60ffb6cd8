"""Every command of the command line: help at once, guesses for typing errors, one line instead of a traceback."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, hear_ctrl_c

from self1e import cli
from self1e.cli import COMMANDS, main

PROGRAMS = {  # each with the words that its help begins with
    **{f"self1e {name}": f"usage: self1e {name}" for name in COMMANDS},
    "train_hf_ivl_seq.py": "usage: train_hf_ivl_seq.py",
    "self1e.evaluation.vqa": "usage: eval_vqas.sh",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_names_its_program(program):
    name, *words = program.split()
    command = [sys.executable, *([name] if name.endswith(".py") else ["-m", name]), *words, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.startswith(PROGRAMS[program]) and not done.stderr


@pytest.mark.parametrize("program", ["eval_all.sh", "eval_vqas.sh"])
def test_evaluation_scripts_pass_help_on(program):
    command = ["bash", str(ROOT / program), "--help"]
    environment = os.environ | {"PYTHON": "echo"}  # before they ask torch for the number of GPUs
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.count("\n") == 1 and done.stdout.endswith("--help\n")


def test_commands_are_listed_and_guessed(capsys):
    assert main(["--help"]) == 0 and all(f"  {name}" in capsys.readouterr().out for name in ["segment"])
    assert main([]) == 2
    assert main(["segmnt"]) == 2
    assert "there is no command 'segmnt'; did you mean segment?" in capsys.readouterr().err
    assert main(["xyz"]) == 2 and "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_ctrl_c_ends_every_command_with_130(command, monkeypatch, capsys):
    class Module:
        @staticmethod
        def main(argv):
            raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: Module)
    assert main([command]) == 130
    error = capsys.readouterr().err
    assert error.strip().count("\n") == 0 and "stopped" in error


def test_a_signal_ends_a_real_process_with_one_line(tmp_path):
    command = [sys.executable, "-m", "self1e", "make-shapes", str(tmp_path / "out"), "--train", "100000"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, preexec_fn=hear_ctrl_c) as running:
        before = running.stderr.read(10)  # its progress bar: it is at work
        running.send_signal(signal.SIGINT)
        try:
            after = running.communicate(timeout=120)[1].decode()
        finally:
            running.kill()
    assert before and running.returncode == 130 and "Traceback" not in after
    assert after.splitlines()[-1] == f"stopped; {tmp_path / 'out'} is not complete, make it anew"


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"data"}))
def test_missing_files_are_one_line_without_a_traceback(command, tmp_path):
    absent = str(tmp_path / "absent")
    picture = ["--image", absent, "--prompt", "it"]
    arguments = {
        "segment": ["--version", absent, *picture, "--output", str(tmp_path / "out")],
        "chat": ["--version", absent, *picture, "--output", str(tmp_path / "out")],
        "demo": ["--version", absent, "--port", "0"],
        "convert": [absent, str(tmp_path / "out"), "--layout", "hf"],
        "export": [absent, "--to", "coco"],
        "pictures": ["--version", absent, *picture],
        "ablate": ["--absent"],
        "make-shapes": ["/dev/null/out"],
        "make-tiny": ["/dev/null/out"],
    }.get(command, [absent])
    run = subprocess.run(
        [sys.executable, "-m", "self1e", command, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode in (1, 2) and "Traceback" not in run.stderr, run.stderr
    assert run.stderr.strip() or run.stdout.strip()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON"),
        ("{}", "expected a list"),
        ('[{"image": 1}]', "is missing"),
        ("[" * 5000, "no JSON"),
    ],
)
def test_malformed_predictions_are_named(tmp_path, capsys, content, message):
    (tmp_path / "predictions.json").write_text(content)
    assert main(["export", str(tmp_path), "--to", "coco"]) == 1
    error = capsys.readouterr().err
    assert message in error and "predictions.json" in error


@pytest.mark.parametrize("content", ["{", "[]", '{"refcoco|unc|val": {}}', '{"a": 3}'])
def test_malformed_summaries_are_named(tmp_path, content, capsys):
    from self1e.training.model_card import structured_results

    path: Path = tmp_path / "summary.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="summary.json: not the summary"):
        structured_results(path)
    path.write_text(json.dumps({"custom|/home/me/val.csv": {"ciou": 0.5, "giou": 0.25, "n": 3}}))
    (result,) = structured_results(path)
    assert result["dataset"]["name"] == "custom val.csv" and [m["value"] for m in result["metrics"]] == [50, 25]
