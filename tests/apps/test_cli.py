"""Every command of the command line: help at once, guesses for typing errors, one line instead of a traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from self1e import cli
from self1e.cli import COMMANDS, main

HEAVY = {"check-data", "score", "ablate", "pictures", "make-tiny"}  # these still import their work before their flags
MODULES = ("torch", "transformers", "gradio", "pandas")


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_names_its_command_and_loads_nothing_heavy(command):
    code = (
        "import sys; from self1e.cli import main\n"
        f"try: main([{command!r}, '--help'])\n"
        f"except SystemExit as end: print('loaded', end.code, *({MODULES!r} & sys.modules.keys()))"
    ).replace(repr(MODULES), repr(set(MODULES)))
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("usage: self1e") and "Traceback" not in run.stderr
    loaded = run.stdout.splitlines()[-1].split()[1:]
    assert loaded[0] == "0"
    if command not in HEAVY:
        assert loaded == ["0"] and run.stdout.startswith(f"usage: self1e {command}")


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
        [sys.executable, "-m", "self1e", command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode in (1, 2) and "Traceback" not in run.stderr, run.stderr
    assert run.stderr.strip() or run.stdout.strip()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("{}", "expected a list"),
        ('[{"image": 1}]', "is missing"),
        ("[" * 5000, "not a JSON"),
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
