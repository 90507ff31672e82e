"""The pages: commands run, figures and tables are those of the code, and whatever is named exists."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from protocols.page import page
from tests import pages, reading_back
from tests.pages import DOCS, PARTS, ROOT, part_of

PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]
ASSET_PAGES = [ROOT / "splitfl" / "assets" / "model" / "README.md"]
MODULES = [p for part in ("splitfl", "party", "model_owner", "protocols") for p in sorted((ROOT / part).rglob("*.py"))]

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="the pages are not part of an installed package")


def words_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


# ---- commands

RUN = re.compile(r"^<!-- run -->\n```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PORT = "127.0.0.1:5555"
LIMIT_S = 900

# `splitfl serve ... &` puts its ready line into a pipe; whatever comes after it waits for that line. At the end every
# server is told to stop and has to end in order.
PRELUDE = r"""
set -euo pipefail
mkfifo ready.pipe
exec 9<>ready.pipe
waited=0
servers=()
splitfl() {
    if [ "$1" = serve ] && [ "$BASHPID" != "$$" ]; then
        exec "$PYTHON" -m splitfl "$@" >&9
    fi
    for number in $(jobs -pr); do
        case " ${servers[*]-} " in *" $number "*) continue ;; esac
        servers+=("$number")
        until read -r -t 0.5 -u 9 word rest; do
            kill -0 "$number"  # fails when the server has ended
            waited=$((waited + 1))
            [ "$waited" -lt 240 ]
        done
        [ "$word" = ready ]
    done
    "$PYTHON" -m splitfl "$@"
}
python() { "$PYTHON" "$@"; }
stop() {
    code=$?
    trap - EXIT
    for number in $(jobs -pr); do
        kill -TERM "$number"
        wait "$number" || code=$?
    done
    exit "$code"
}
trap stop EXIT
"""


def script_of(path: Path) -> str:
    """The commands of a page that are to be run, in its order; `make` and installing are left to CI."""
    lines = "".join(RUN.findall(words_of(path))).splitlines()
    return "\n".join(line for line in lines if not line.startswith(("make ", "pip ")))


RUNNABLE = [path for path in PAGES if script_of(path)]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def run_script(script: str, folder: Path, limit_s: float = LIMIT_S) -> subprocess.CompletedProcess[str]:
    """Run `script` with bash in `folder`; neither it nor anything it has started survives."""
    script = PRELUDE + script.replace(PORT, f"127.0.0.1:{free_port()}")
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (folder / "output.txt").open("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            ["bash", "-c", script], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return subprocess.CompletedProcess("bash", code, stdout=output.read())


def test_the_readme_has_commands_that_are_run():
    script = script_of(ROOT / "README.md")
    for word in ("keys new", "keys allow", "kit", "serve", "tune", "generate", "evaluate"):
        assert f"splitfl {word} " in script


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.skipif(os.name != "posix", reason="the pages show commands for a POSIX shell")
@pytest.mark.parametrize("path", RUNNABLE, ids=names(RUNNABLE))
def test_commands_of_a_page_run(path, tmp_path):
    done = run_script(script_of(path), tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]


def runs(number: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked about yet does not."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
class TestTheRunner:
    """A runner that hides a failure would be worse than none."""

    def test_a_failing_command_fails(self, tmp_path):
        done = run_script("splitfl keys show nowhere.key\necho not reached", tmp_path, 60)
        assert done.returncode == 5
        assert "not reached" not in done.stdout

    def test_a_server_that_does_not_start_fails_what_comes_after(self, tmp_path):
        done = run_script(
            "splitfl serve --model nowhere --kit nowhere &\nsplitfl keys new owner --out keys", tmp_path, 180
        )
        assert done.returncode != 0
        assert not (tmp_path / "keys").exists()

    def test_what_a_script_leaves_running_is_ended(self, tmp_path):
        run_script("trap - EXIT\nsleep 600 & echo $! > pid", tmp_path, 60)
        number, deadline = int(words_of(tmp_path / "pid")), time.monotonic() + 20
        while runs(number) and time.monotonic() < deadline:
            time.sleep(0.01)  # SIGKILL was sent; when it arrives is up to the kernel
        assert not runs(number)


# ---- links and names

LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED = re.compile(r"`((?:splitfl|party|model_owner|protocols|tests|examples)/[\w./]+?)(?:::([A-Za-z_.]+))?`")


def anchors(path: Path) -> set[str]:
    """What a heading is called in a link, as GitHub and most other renderers do it."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", words_of(path), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", [*PAGES, *ASSET_PAGES], ids=names([*PAGES, *ASSET_PAGES]))
def test_links_lead_somewhere(path):
    broken = []
    for link in LINK.findall(words_of(path)):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("path", PAGES, ids=names(PAGES))
def test_files_and_functions_that_a_page_names_exist(path):
    missing = []
    for file, attribute in NAMED.findall(words_of(path)):
        found = (ROOT / file).exists()
        if found and attribute:
            target = importlib.import_module(file.removesuffix(".py").replace("/", "."))
            for part in attribute.split("."):
                target = getattr(target, part, None)
            found = target is not None
        if not found:
            missing.append(f"{file}::{attribute}")
    assert missing == []


@pytest.mark.parametrize("path", PAGES, ids=names(PAGES))
def test_no_page_names_a_place_on_somebodys_machine(path):
    assert re.findall(r"(?<![\w.])(?:/(?:work|root|home|tmp|Users|mnt|opt)/|[A-Z]:\\)[\w./-]*", words_of(path)) == []


@pytest.mark.parametrize("path", PAGES, ids=names(PAGES))
def test_every_part_of_a_page_that_is_marked_is_made_by_something(path):
    marks = re.findall(r"<!-- begin: (.+?) -->", words_of(path))
    assert marks == re.findall(r"<!-- end: (.+?) -->", words_of(path))
    if path.parent == DOCS and path.name in PARTS:
        assert sorted(marks) == sorted(PARTS[path.name])


# ---- generated parts

QUICK = [(name, part) for name, parts in PARTS.items() for part in parts if name != "journey.md"]


@pytest.mark.parametrize(("name", "part"), QUICK, ids=[f"{name}: {part}" for name, part in QUICK])
def test_a_table_is_what_the_code_says(name, part):
    assert part_of(words_of(DOCS / name), part) == PARTS[name][part](), "run `make docs`"


def test_the_page_of_protocols_is_current():
    assert words_of(DOCS / "protocols.md") == page(), "run `make docs`"


# ---- figures


@pytest.fixture(scope="module")
def figures():
    return pages.journey()


def numbers_in(value: object) -> set[int]:
    """All whole numbers in a figure."""
    if isinstance(value, bool | float | str) or value is None:
        return set()
    if isinstance(value, int):
        return {value}
    items = value.values() if isinstance(value, dict) else value
    return set().union(*map(numbers_in, items)) if items else set()


def shapes_in(value: object) -> set[tuple[int, ...]]:
    """All tuples of whole numbers in a figure."""
    if isinstance(value, tuple) and value and all(isinstance(n, int) for n in value):
        return {value}
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return set().union(*map(shapes_in, items)) if items else set()


JOURNEY = DOCS / "journey.md"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_figures_of_the_journey_are_those_that_are_measured(figures):
    text = re.sub(r"<!-- begin.*?<!-- end[^>]*-->", "", words_of(JOURNEY), flags=re.DOTALL)
    text = re.sub(r"\s+", " ", text)
    measured = numbers_in(figures)
    said = {int(n.replace(",", "")) for n in re.findall(r"\b\d{1,3}(?:,\d{3})+\b", text)}
    said |= {int(n.replace(",", "")) for n in re.findall(r"\b(\d[\d,]*) bytes", text)}
    assert said - measured == {255}, "a number of ZeroMQ's, for frames without a long length"
    shapes = {tuple(map(int, shape.split(", "))) for shape in re.findall(r"\[(\d+(?:, \d+)+)\]", text)}
    assert shapes - shapes_in(figures) == set()
    *lengths, last = map(str, figures["lengths of the rows"])
    assert f"have {', '.join(lengths)} and {last} tokens" in text
    assert f"a loss of {figures['loss']:.2f} nats" in text
    assert f"{figures['headers and mask, per cent']} per cent" in text
    rows = figures["rows of each request"][1]
    assert f"`rows` = {', '.join(map(str, rows))} with the second request" in text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_of_the_owner_is_what_is_measured(figures):
    section = re.findall(r"^## Memory\n(.*?)^## ", words_of(DOCS / "reliability.md"), re.DOTALL | re.MULTILINE)[0]
    said = [int(number.replace(",", "")) for number in re.findall(r"\| ([\d,]+) \|", section)]
    wanted = ("bytes of the step's graph", "bytes at the cut", "bytes of a cache for one position")
    assert said == [figures[name] for name in wanted]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_crosses_in_the_journey_is_what_the_page_shows(figures):
    text = words_of(JOURNEY)
    assert part_of(text, "header") == pages.header(figures)
    assert part_of(text, "retry") == pages.retry(figures)
    assert figures["both forwards are the same bytes"]
    assert figures["all backwards are the same bytes"]
    assert figures["gradient rows that are zero"] == figures["positions that are padding"] + len(
        figures["lengths of the rows"]
    )


def test_steps_of_the_journey_are_those_of_the_modules():
    sections = dict(re.findall(r"^### (\d+)\. .*?\n(.*?)(?=^##)", words_of(JOURNEY) + "\n##", re.DOTALL | re.MULTILINE))
    assert [int(number) for number in sections] == list(range(15))
    missing = []
    for module in MODULES:
        first = words_of(module).partition("\n")[0]
        said = re.match(r'"""Steps? ([\d, toand]+) (?:of the journey|and their way back)', first)
        numbers = re.findall(r"\d+", said[1]) if said else []
        if said and " to " in said[1]:
            numbers = numbers[:1]  # told where the first of them begins
        name = module.relative_to(ROOT).as_posix()
        missing += [f"{name} in step {n}" for n in numbers if f"`{name}" not in sections.get(n, "")]
    assert missing == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_figures_of_the_threat_model_are_those_that_are_measured(tmp_path):
    text = words_of(DOCS / "threat-model.md")
    found = reading_back.measure(tmp_path)
    tokens = found["tokens"]
    assert f"{tokens} tokens" in text
    cases = ("first step", "first step, bfloat16", "after tuning")
    assert [found[f"by search, {case}"] for case in cases] == [tokens] * 3
    by_search, by_matrix = re.findall(r"\| (\d+) of \d+ tokens \| (\d+) of \d+ tokens \| (\d+) of \d+ tokens \|", text)
    assert [int(said) for said in by_search] == [tokens] * 3
    for said, case in zip(by_matrix, cases, strict=True):
        assert abs(int(said) - found[f"by one matrix, {case}"]) < tokens // 20
    answers = found["answer tokens"]
    assert found["answers from the gradient, no top"] == answers
    assert f"{answers} of {answers} answer tokens" in text
    assert f"after {found['steps']} steps of tuning" in text
