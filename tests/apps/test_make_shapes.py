"""The command that writes synthetic scenes."""

import pytest

from self1e.apps import make_shapes
from self1e.synthetic.benchmark import FAMILIES


def test_the_command_writes_the_benchmark_and_refuses_nonsense(tmp_path, capsys):
    assert make_shapes.main([str(tmp_path), "--benchmark", "--train", "12", "--val", "1", "--size", "96"]) == 0
    assert {path.name for path in (tmp_path / "benchmark").iterdir()} == {"train", *FAMILIES}
    for flags in (["--size", "64"], ["--simple"], ["--val", "0"]):
        with pytest.raises(SystemExit):
            make_shapes.main([str(tmp_path), "--benchmark", *flags])
        assert flags[0] in capsys.readouterr().err
