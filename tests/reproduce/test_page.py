"""The page that follows the review: every section, commands and pages that exist, no number for what was not run."""

import re

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("transformers")

from shunter.cli import main
from shunter.reproduce.headline import counted
from shunter.reproduce.page import SECTIONS
from shunter.reproduce.registry import ALL
from shunter.reproduce.results import DIRECTION, NOT_RUN, Row, read

from ..pages import ROOT

KEPT = ROOT / "docs" / "reproduction"


def test_every_section_of_the_review_has_its_line():
    numbered = [heading.split()[0] for heading in SECTIONS if heading[0].isdigit()]
    assert numbered == [str(n) for n in range(1, 10)]
    assert {one.section for one in ALL} <= set(SECTIONS)
    for heading, line in SECTIONS.items():
        commands = re.findall(r"`shunter [^`]*`", line)
        made = [one for one in ALL if one.section == heading]
        assert commands or made or "`docs/" in line, f"{heading}: neither a command nor a page"


@pytest.mark.skipif(not KEPT.is_dir(), reason="no pages beside the package")
def test_its_commands_and_pages_exist(capsys):
    text = " ".join(SECTIONS.values())
    assert "](" not in text, "links would lead nowhere from a folder of results"
    for page in re.findall(r"`(docs/[^`]*)`", text):
        assert (ROOT / page).is_file(), page
    for command in sorted(set(re.findall(r"`shunter ([^`]*)`", text))):
        verb, *rest = command.split()
        with pytest.raises(SystemExit) as ended:
            main([verb, "--help"])
        assert ended.value.code == 0, f"shunter {command}: there is no {verb}"
        assert not rest or rest[0] in capsys.readouterr().out, f"shunter {command}: {verb} has no {rest[0]}"


def test_what_was_not_run_has_no_number():
    with pytest.raises(ValueError, match="not run"):
        Row("a", "b", "1.5", NOT_RUN)


def test_counted_numbers_are_those_of_the_shapes():
    glam, st_moe = counted()
    # GLaM: attention of 64 layers, 32 gated dense blocks, 32 layers of two experts of two matrices, the vocabulary
    d, f = 8192, 32768
    active = 64 * 4 * d * 128 * 128 + 32 * 3 * d * f + 32 * 2 * 2 * d * f + 32 * 64 * d + 256000 * d
    flops = 2 * active + 64 * 2 * 512 * 2 * 128 * 128
    assert f"{flops / 1e9:.0f} and 354 GFLOP" in glam.ours and "45 % fewer" in glam.ours
    assert "1,080 GFLOP" in st_moe.ours and st_moe.verdict == DIRECTION == glam.verdict


@pytest.mark.skipif(not KEPT.is_dir(), reason="no kept results beside the package")
def test_the_seventeen_numbers_have_a_row_each():
    rows = read(KEPT, "headline").rows
    assert len(rows) == 17 == len({row.what for row in rows})
    assert all(bool(row.ours) == (row.verdict in ("reproduced", "same direction", "not reproduced")) for row in rows)
    assert all(row.why for row in rows if not row.ours)


def test_every_entry_is_in_a_section_of_the_page():
    assert not {one.name: one.section for one in ALL if one.section not in SECTIONS}
