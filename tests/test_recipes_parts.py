"""Parts of the recipes: whose rows are whose, rewrite rules, scores, the hook, the review queue."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from examples.code_migration.hook import LONGEST_OUTPUT, command, run_hook
from examples.code_migration.prepare import spread
from examples.code_migration.review import export, shown
from examples.code_migration.review_queue import Proposal, Queue, acceptance, similarity
from examples.code_migration.rules import RULES, edits, rule_named
from examples.code_migration.syntax import unit
from examples.code_translation.projects import PARTIES, party_of, placed, project_of
from examples.medical_financial.prepare import financial, medquad, pubmedqa
from examples.moderation.hatecheck import by_functionality, chosen, macro_f1, offsets_of
from examples.moderation.prepare import SHARES, deal
from examples.natural_partitions.prepare import dolly, party_name, speakers, split
from examples.rows import SKIPPED, drawn, named, need, read, write
from splitfl.errors import DataError, UsageError

ROOT = Path(__file__).parents[1]
OK, NOT_OK = "int f() {return 1;}", "int f() {return 1 +;}"


# ---- rows


def test_rows_are_drawn_by_what_they_hold_and_each_once():
    rows = [{"text": str(number)} for number in range(50)]
    once = drawn(rows, 10)
    assert once == drawn([*reversed(rows), *rows], 10)
    assert len({row["text"] for row in once}) == 10
    assert once != drawn(rows, 10, "other") != rows[:10]


def test_rows_are_read_plain_or_packed(tmp_path):
    write(tmp_path / "plain" / "train.jsonl", [{"text": "é"}])
    assert read(tmp_path / "plain", "train") == [{"text": "é"}]
    import gzip

    (tmp_path / "packed").mkdir()
    with gzip.open(tmp_path / "packed" / "train.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"text": "é"}\n')
    assert read(tmp_path / "packed", "train") == [{"text": "é"}]
    with pytest.raises(DataError, match="has no validation"):
        read(tmp_path / "plain", "validation")


def test_absent_data_is_said_and_ends_with_a_code_of_its_own(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        need(tmp_path, "medquad")
    assert stop.value.code == SKIPPED
    assert "skipped: medquad is not in" in capsys.readouterr().err


def test_words_without_a_name_are_refused():
    assert named(["a=b=c"]) == {"a": Path("b=c")}
    with pytest.raises(SystemExit):
        named(["nothing"])


# ---- whose rows


@pytest.mark.parametrize(
    ("java", "cs", "project"),
    [
        ("public int size() {return size;}", "public int Size(){return size;}", None),
        ("public AResult a(ARequest r) {r = beforeClientExecution(r);}", "", "aws"),
        ('public XRequest() {super("Cloud-Photo", "2017-07-11", "X");}', "", "aliyun"),
        ("public RevFilter clone() {return this;}", "", "jgit"),
        ("public void f() {}", "public virtual NGit.Api.Git F(){}", "jgit"),
        ("public ATNState f() {}", "", "antlr"),
        ("public void f(HSSFSheet s) {}", "", "poi"),
        ("public BytesRef f() {}", "", "lucene"),
        ("public void f(Refund r) {}", "", None),  # a word is a whole word
    ],
)
def test_a_pair_of_methods_is_placed_by_names_of_one_project(java, cs, project):
    assert project_of(java, cs) == project
    party = party_of({"java": java, "cs": cs})
    assert (party is None) == (project is None)
    assert party is None or project in PARTIES[party]


def test_every_project_belongs_to_exactly_one_party():
    held = Counter(project for projects in PARTIES.values() for project in projects)
    assert set(held.values()) == {1}
    assert placed([{"java": "BytesRef f()", "cs": ""}, {"java": "x", "cs": ""}]) == {"lucene": 1, "-": 1}


def test_label_shares_differ_between_servers_and_no_row_is_dealt_twice():
    rows = [{"text": f"{label} {n}", "label": label, "label_name": "x"} for label in (0, 1, 2) for n in range(400)]
    dealt = deal(rows, 100, "salt")
    texts = [row["text"] for own in dealt.values() for row in own]
    assert len(texts) == len(set(texts)) == 100 * len(SHARES)
    for server, own in dealt.items():
        counts = Counter(row["label"] for row in own)
        assert [counts[label] / 100 for label in (0, 1, 2)] == pytest.approx(list(SHARES[server]), abs=0.011)


def test_speeches_go_to_their_speaker_in_order():
    text = "First:\none two\n\nSecond:\nthree\n\nnobody says this\n\nFirst:\nfour\nfive\n"
    assert speakers(text, words=3) == {
        "First": [{"text": "one two\nfour\nfive"}],
        "Second": [{"text": "three"}],
    }
    assert party_name("KING RICHARD II") == "king-richard-ii"


def test_clients_keep_their_rows_and_parts_do_not_overlap():
    rows = [
        {"client": n % 2, "instruction": f"do {n}", "context": "", "response": "done", "category": "x"}
        for n in range(20)
    ]
    found = dolly([*rows, {**rows[0], "client": None}])
    assert {name: len(own) for name, own in found.items()} == {"client0": 10, "client1": 10}
    parts = split(found["client0"], {"train": 100, "held": 2, "test": 3})
    assert [len(parts[name]) for name in ("train", "held", "test")] == [5, 2, 3]
    asked = [row["instruction"] for part in parts.values() for row in part]
    assert len(set(asked)) == 10


def test_health_and_finance_rows_go_where_the_page_says():
    assert medquad({"question": "Q?", "answer": "A.", "source": "GHR"})[0] == "genetics"
    assert medquad({"question": "Q?", "answer": "A.", "source": "CDC"})[0] is None
    party, row = pubmedqa({"pmid": "7", "question": "Q?", "context": "c" * 900, "label": "maybe"})
    assert (party, row["label"], len(row["text"])) == ("second-clinic", 2, 403)
    assert financial({"text": "Rates rise https://t.co/x", "label": 2}) == (
        "economy", {"text": "Rates rise", "label": 2}
    )  # fmt: skip
    assert financial({"text": "$AB up, $AB!", "label": 1})[0] == "one-share"
    assert financial({"text": "$AB up, $CD down, 5 $", "label": 1})[0] == "portfolio"


# ---- rewrite rules


@pytest.mark.parametrize(
    ("rule", "before", "after"),
    [
        ("box", "Integer n = new Integer(x);", "Integer n = Integer.valueOf(x);"),
        ("diamond", "Map<A, B> m = new HashMap<A, B>(3);", "Map<A, B> m = new HashMap<>(3);"),
        ("buffer", "StringBuffer b = new StringBuffer();", "StringBuilder b = new StringBuilder();"),
        ("vector", "Object o = ((Vector) v).elementAt(0);", "Object o = ((ArrayList) v).get(0);"),
        ("hashtable", "Hashtable h = new Hashtable();", "HashMap h = new HashMap();"),
        ("empty", "if (a.b().size() == 0) {", "if (a.b().isEmpty()) {"),
        ("empty", "return names.length() > 0;", "return !names.isEmpty();"),
        ("to-array", "return l.toArray(new Ref[l.size()]);", "return l.toArray(new Ref[0]);"),
        ("braces", "if (f(a) == (b))return c;", "if (f(a) == (b)) {return c;}"),
        ("response", "public FooResult foo(FooRequest r) {", "public FooResponse foo(FooRequest r) {"),
    ],
)  # fmt: skip
def test_a_rule_rewrites_what_it_is_for_and_is_content_with_its_own_work(rule, before, after):
    rewrite = rule_named(rule).rewrite
    assert rewrite(before) == after
    assert rewrite(after) == after


@pytest.mark.parametrize(
    "code",
    [
        "List<String> l = new ArrayList<Object>();", "MyVector v = x.elementAt(1);", "if (x.size() == 10) {",
        "FooResult f = g(BarRequest r);", "if (a) b();", "renew Integer(1);", "int i = a.length == 0 ? 1 : 2;",
    ],
)  # fmt: skip
def test_what_only_looks_like_a_migration_stays(code):
    assert {rule.name for rule in RULES if rule.rewrite(code) != code} == set()


def test_an_edit_is_a_piece_of_a_method_and_fits_back():
    method = "void f() {  if (a.size() == 0)return;g(); Vector v = h();}"
    found = list(edits(method))
    assert [(one.rule.name, one.before) for one in found] == [
        ("empty", "if (a.size() == 0)return;"), ("braces", "if (a.size() == 0)return;"), ("vector", "Vector v = h();"),
    ]  # fmt: skip
    assert found[0].applied() == method.replace("a.size() == 0", "a.isEmpty()")
    assert found[2].applied("x;") == "void f() {  if (a.size() == 0)return;g(); x;}"


def test_rare_migrations_are_not_crowded_out():
    rows = [{"rule": "common", "n": n} for n in range(50)] + [{"rule": "rare", "n": n} for n in range(3)]
    assert Counter(row["rule"] for row in spread(rows, 10)) == {"common": 7, "rare": 3}


# ---- scores


def test_translation_scores():
    pytest.importorskip("codebleu", reason="the extra recipes is not installed")
    from examples.code_translation.score import METRICS, scores, tokens

    right = "public virtual int Get(int a){int b = a; return b;}"
    assert tokens('x1+="a b";') == ["x1", "+", "=", '"', "a", "b", '"', ";"]
    perfect = scores([right], [right])
    assert set(perfect) == set(METRICS)
    assert all(value == pytest.approx(1, abs=0.01) for value in perfect.values())
    renamed, other = scores([right.replace("b", "c")], [right]), scores(["while"], [right])
    for metric in METRICS:
        assert other[metric] <= renamed[metric] <= perfect[metric]
    assert renamed["exact"] == 0
    assert 0.5 < renamed["BLEU"] < 1
    assert scores([right + " ", ""], [right, right])["exact"] == 0.5  # blanks between tokens do not count
    with pytest.raises(UsageError, match="1 predictions and 2 references"):
        scores([""], ["", ""])


def test_thresholds_are_read_by_the_names_of_classes(tmp_path):
    assert offsets_of(tmp_path, 3) == [0.0, 0.0, 0.0]
    (tmp_path / "thresholds.json").write_text('{"logit_offsets": {"2": 0.3, "0": 0.1, "1": -0.2}}')
    assert offsets_of(tmp_path, 3) == [0.1, -0.2, 0.3]


def test_hatecheck_scores():
    cases = [
        {"functionality": "a", "label": "hateful"}, {"functionality": "a", "label": "hateful"},
        {"functionality": "b", "label": "non-hateful"},
    ]  # fmt: skip
    assert by_functionality(cases, [True, False, False]) == {"a": 0.5, "b": 1.0}
    assert macro_f1(cases, [True, False, False]) == pytest.approx(2 / 3)
    assert macro_f1(cases, [True, True, False]) == 1
    assert Counter(case["functionality"] for case in chosen(cases, 1)) == {"a": 1, "b": 1}


# ---- the hook


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_a_hook_sees_the_file_in_an_empty_folder_and_little_else(tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITFL_SECRET", "token")
    code = (
        "import os, sys; assert os.listdir() == ['Proposal.java'] == sys.argv[1:]; assert sys.stdin.read() == '';"
        "assert 'SPLITFL_SECRET' not in os.environ; print(os.getcwd(), open(sys.argv[1]).read())"
    )
    outcome = run_hook(python(code), "class A {}", limit_s=60)
    assert (outcome.verdict, outcome.code) == ("passed", 0), outcome.output
    folder, _, text = outcome.output.partition(" ")
    assert text.startswith("class A {}")
    assert not Path(folder).exists()


def test_a_hook_that_fails_says_why():
    outcome = run_hook(python("import sys; print('no\\x1b[31m', file=sys.stderr); sys.exit(3)"), "", limit_s=60)
    assert (outcome.verdict, outcome.code) == ("failed", 3)
    assert "no" in outcome.output
    assert "\x1b" not in outcome.output


def test_a_hook_that_takes_too_long_is_ended_with_what_it_started(tmp_path):
    mark = tmp_path / "late"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    started = time.monotonic()
    outcome = run_hook(python(code), "", limit_s=1.5)
    assert (outcome.verdict, outcome.code) == ("timeout", None)
    assert time.monotonic() - started < 30
    time.sleep(4)  # longer than the child would have slept: nothing else would show that it is gone
    assert not mark.exists()


def test_what_a_hook_prints_is_cut():
    outcome = run_hook(python("import sys; sys.stdout.write('y' * 10**6)"), "", limit_s=60)
    assert outcome.verdict == "passed"
    assert 0 < len(outcome.output) <= LONGEST_OUTPUT
    endless = run_hook(python("import sys\nwhile True: sys.stdout.write('y' * 10**6)"), "", limit_s=60)
    assert endless.verdict == "failed"  # stopped by the limit of a file, long before the limit of time


def test_a_hook_is_what_the_party_named_and_no_shell_reads_it(tmp_path):
    assert command("make 'a b' --x")[1] == "a b"
    outcome = run_hook(
        command(f"{sys.executable} -c 'import sys; print(sys.argv)' ; touch {tmp_path}/x"), "", limit_s=60
    )
    assert outcome.verdict == "passed"
    assert not (tmp_path / "x").exists()
    for text in ("", "'open"):
        with pytest.raises(UsageError):
            command(text)
    with pytest.raises(UsageError, match="cannot be started"):
        run_hook(("no-such-command-here",), "", limit_s=5)


def test_the_default_hook_parses_java(monkeypatch):
    pytest.importorskip("tree_sitter_java", reason="the extra recipes is not installed")
    monkeypatch.setenv("PYTHONPATH", str(ROOT) + (":" + path if (path := sys_path()) else ""))
    assert run_hook(command(None), unit(OK), limit_s=60).verdict == "passed"
    wrong = run_hook(command(None), unit(NOT_OK), limit_s=60)
    assert wrong.verdict == "failed"
    assert "line 2" in wrong.output


def sys_path() -> str:
    import os

    return os.environ.get("PYTHONPATH", "")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("javac") is None, reason="javac is not installed")
def test_the_javac_hook_forgives_names_and_nothing_else():
    hook = [str(ROOT / "examples" / "code_migration" / "javac.sh")]
    verdicts = {
        method: run_hook(hook, unit(method), limit_s=120).verdict
        for method in (OK, NOT_OK, "Other f() {return g(new Other());}", 'int f() {return "text";}')
    }
    assert list(verdicts.values()) == ["passed", "failed", "passed", "failed"]


# ---- the review queue


def proposals() -> list[Proposal]:
    made = {"rule": "empty", "method": "a b c", "start": 2, "end": 3, "expected": "x"}
    return [
        Proposal(id="p1", proposed="x", verdict="passed", **made),
        Proposal(id="p2", proposed="b", verdict="passed", **made),
        Proposal(id="p3", proposed="y", verdict="failed", **made),
    ]


def test_decisions_are_kept_and_made_once(tmp_path):
    queue = Queue(tmp_path / "queue.jsonl")
    queue.proposals = proposals()
    queue.decide(["p1"], "accepted", reviewer="ada", reason="fine")
    queue.decide(["p2", "p3"], "rejected", reviewer="ada")
    queue.write()
    again = Queue(tmp_path / "queue.jsonl")
    assert [one.status for one in again.proposals] == ["accepted", "rejected", "rejected"]
    assert again.proposals[0].after == "a x c"
    assert again.proposals[0].reviewer == "ada"
    assert again.proposals[0].decided.endswith("Z")
    with pytest.raises(UsageError, match="accepted already, by ada"):
        again.decide(["p1"], "rejected", reviewer="bob")
    assert [row["completion"] for row in export(again)] == ["x"]
    assert "- b" in shown(again.proposals[0])


@pytest.mark.parametrize(
    ("names", "reviewer", "message"),
    [(["p1", "p9"], "ada", "no proposal 'p9'"), (["p1", "p3"], "ada", "did not pass"), (["p1"], " ", "nobody")],
)
def test_a_wrong_decision_changes_nothing(tmp_path, names, reviewer, message):
    queue = Queue(tmp_path / "queue.jsonl")
    queue.proposals = proposals()
    with pytest.raises(UsageError, match=message):
        queue.decide(names, "accepted", reviewer=reviewer)
    assert {one.status for one in queue.proposals} == {"pending"}


@pytest.mark.parametrize("line", ["{}", "no json", json.dumps({**vars(proposals()[0]), "status": "merged"})])
def test_a_file_that_is_no_queue_is_refused(tmp_path, line):
    (tmp_path / "queue.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="queue"):
        Queue(tmp_path / "queue.jsonl")


def test_acceptance():
    assert acceptance(proposals()) == pytest.approx(
        {"hook passed": 2 / 3, "exact": 1 / 3, "similarity": 1 / 3, "unchanged": 1 / 3}
    )
    assert similarity("abc", "abc") == 1
    assert similarity("abc", "xyz") == 0


def test_the_review_command(tmp_path):
    queue = Queue(tmp_path / "queue.jsonl")
    queue.proposals = proposals()
    queue.write()

    def review(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "examples.code_migration.review", str(queue.path), *words],
            cwd=ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    assert review("accept", "p1", "--reviewer", "ada").returncode == 0
    assert "did not pass" in review("accept", "p3", "--reviewer", "ada").stderr
    listed = review("list", "--status", "pending").stdout
    assert "p1" not in listed
    assert "p2" in listed
    assert "accepted 1.00" in listed
