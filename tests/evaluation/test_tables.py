"""Tables."""

from self1e.evaluation.tables import markdown_table


def test_table_lines_up():
    lines = markdown_table(["name", "x"], [["a|b", "1.00"], ["c", "10.00"]]).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[2] == "| a\\|b |  1.00 |"
