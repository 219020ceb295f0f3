"""Every figure of the paper that concerns the model has a command that makes it, on a tiny model, as PNG and SVG."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from megatron_itt.analysis import router_figures
from megatron_itt.analysis.figures import DRAW, draw_measurement, moving_mean
from megatron_itt.analysis.measurement import Measurement, read_measurement, write_measurement
from megatron_itt.cli import run
from megatron_itt.errors import DataError
from megatron_itt.log import run_command
from tests.unit.analysis.runs import real_recipe, routing_line, run_lines, write_run
from tests.unit.evaluation.exports import standard_library_texts

PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "passage.txt"
    path.write_text(standard_library_texts(1)[0][:2500], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def questions_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = [
        {"question": f"What is {n} + {n}?", "options": [f"A){2 * n}", f"B){n}"], "correct": "AB"[n % 2]}
        for n in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    lines = run_lines()
    lines[3] = routing_line(3)
    lines[7] = routing_line(7)
    plain = [{**line, "validation": [{**row, "budget": None} for row in line["validation"]]} if "validation" in line
             else line for line in run_lines()]  # fmt: skip
    return [
        write_run(folder / "llama", plain, recipe=real_recipe("none")),
        write_run(folder / "itt", lines, recipe=real_recipe("itt")),
    ]


def test_every_command_measures_draws_and_says_what_it_left_out(
    *, itt_dir: Path, llama_dir: Path, text_file: Path, questions_file: Path, runs: list[Path], tmp_path: Path
) -> None:
    model, text = ["--model", str(itt_dir)], ["--text", str(text_file)]
    both = [part for run in runs for part in ("--run", str(run))]
    commands = {
        "routing": [*model, *text],
        "weights": [*model, *text, "--max-tokens", "400"],
        "oracle": [*model, *text, "--max-tokens", "40"],
        "steps": model,
        "history": ["--run", str(runs[1])],
        "budgets": [*model, "--model", str(llama_dir), *text, "--max-tokens", "200", "--grid", "0.25,0.5,1.0"],
        "gradients": ["--model", str(llama_dir), "--questions", str(questions_file), "--train", "2"],
        "curves": both,
        "scaling": both,
    }
    kinds = set()
    for name, arguments in commands.items():
        output = tmp_path / f"{name}.json"
        assert run(["analyse", name, *arguments, "--output", str(output), "--plot"]) == 0
        assert output.with_suffix(".png").read_bytes().startswith(PNG)
        kinds.add(read_measurement(output).kind)
    of_study = {"ladder"}
    assert kinds == {*DRAW, *router_figures.DRAW} - of_study, "a kind of measurement has no command"
    assert not list(tmp_path.glob("*.partial"))
    assert run(["analyse", "plot", str(tmp_path / "curves.json"), str(tmp_path / "steps.json"), "--format", "svg"]) == 0
    for name in ("curves", "steps"):
        assert ElementTree.parse(tmp_path / f"{name}.svg").getroot().tag.endswith("svg")
    drawn = (tmp_path / "curves.svg").read_text()
    assert "training tokens" in drawn and ">20 k<" in drawn


def test_equal_measurements_give_equal_svg_files(itt_dir: Path, tmp_path: Path) -> None:
    assert run(["analyse", "steps", "--model", str(itt_dir), "--output", str(tmp_path / "a.json")]) == 0
    measurement = read_measurement(tmp_path / "a.json")
    draw_measurement(measurement, tmp_path / "1.svg")
    draw_measurement(measurement, tmp_path / "2.svg")
    assert (tmp_path / "1.svg").read_bytes() == (tmp_path / "2.svg").read_bytes()


def test_figures_refuse_what_they_cannot_draw(tmp_path: Path) -> None:
    known = Measurement(kind="curves", values={"runs": []})
    for measurement, name, told in (
        (Measurement(kind="weather", values={}), "a.png", "weather"),
        (known, "a.pdf", ".png or .svg"),
        (Measurement(kind="routing", values={"tokens": ["a"]}), "a.png", "measure again"),
    ):
        with pytest.raises(DataError, match=told):
            draw_measurement(measurement, tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(DataError, match="overwrite"):
        draw_measurement(known, tmp_path / "b.png")
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("not json", "not valid JSON"),
        ("[1]", "not a measurement"),
        ('{"format": 99, "kind": "routing", "values": {}}', "format 99"),
        (None, "cannot be read"),
    ],
)
def test_files_that_are_no_measurements_are_refused(tmp_path: Path, content: str | None, told: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=told):
        read_measurement(path)


def test_a_measurement_is_written_once_and_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_measurement(Measurement(kind="curves", values={"x": [float("nan"), 1.5]}, notes=["n"]), path)
    assert read_measurement(path).values == {"x": [None, 1.5]}
    with pytest.raises(DataError, match="overwrite"):
        write_measurement(Measurement(kind="curves", values={}), path)


def test_bad_input_is_one_line_and_leaves_nothing(
    itt_dir: Path, llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n", encoding="utf-8")
    cases = {
        "is empty": ["routing", "--model", str(itt_dir), "--text", str(empty)],
        "no router": ["routing", "--model", str(llama_dir), "--text", str(tmp_path / "t.txt")],
        "no thinking layers": ["steps", "--model", str(llama_dir)],
        "1 shares": ["weights", "--model", str(itt_dir), "--text", str(tmp_path / "t.txt"), "--budget", "0.5"],
        "do not exist": ["gradients", "--model", str(llama_dir), "--questions", str(tmp_path / "absent.jsonl")],
    }
    (tmp_path / "t.txt").write_text("some text", encoding="utf-8")
    for told, arguments in cases.items():
        code = run_command(
            lambda arguments=arguments: run(["analyse", *arguments, "--output", str(tmp_path / "o.json")])
        )
        error = capsys.readouterr().err
        assert code == 2, told
        assert told in error
        assert error.count("error: ") == 1 and "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "t.txt"]


def test_means_reach_back() -> None:
    assert moving_mean([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]
