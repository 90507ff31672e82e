"""Score translations: BLEU, CodeBLEU, METEOR, ROUGE-L, exact match. See `python -m examples.code_translation.score -h`.

Nothing is downloaded. METEOR's synonyms need WordNet, a download that says nothing about code, so that module is off
and words match exactly or by their stems. CodeBLEU parses both sides with tree-sitter.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.compare import BEFORE, compare, figures
from examples.compare import table as losses
from examples.rows import lines, named, write
from examples.whole import Whole
from splitfl.errors import UsageError
from splitfl.metrics import Result, write_results

_TOKEN = re.compile(r"[A-Za-z_]\w*|\d+(?:\.\d+)?|\S")
METRICS = ("BLEU", "CodeBLEU", "METEOR", "ROUGE-L", "exact")


def tokens(code: str) -> list[str]:
    """Names, numbers, and every other visible character by itself."""
    return _TOKEN.findall(code)


class _Words:
    """The tokenizer above for ROUGE, whose own drops all that is no letter or digit."""

    def tokenize(self, text: str) -> list[str]:
        return tokens(text)


class _NoSynonyms:
    """What stands in for WordNet: no word has a synonym."""

    def synsets(self, _word: str) -> list[Any]:
        return []


def scores(predictions: Sequence[str], references: Sequence[str], *, language: str = "c_sharp") -> dict[str, float]:
    """All metrics over a set of translations, each from 0 to 1.

    BLEU is sacrebleu's corpus BLEU-4 on the tokens above (Papineni et al., 2002; smoothing "exp"); CodeBLEU is Ren et
    al., arXiv 2009.10297, with four equal weights, on the same tokens; METEOR (Banerjee and Lavie, 2005) and ROUGE-L
    (Lin, 2004; F-measure) are means over rows.

    Args:
        predictions: what a model wrote.
        references: what was to be written, as many.
        language: a language of `codebleu`.

    Raises:
        UsageError: the extra `recipes` is not installed, or there is not one reference for each prediction.
    """
    if len(predictions) != len(references) or not references:
        raise UsageError(
            f"there are {len(predictions)} predictions and {len(references)} references", expected="as many, and one"
        )
    try:
        import sacrebleu
        from codebleu import calc_codebleu
        from nltk.translate.meteor_score import single_meteor_score
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UsageError(
            f"the scores need {error.name}, which is not installed", hint="pip install 'splitfl[recipes]'"
        ) from error
    spaced = [" ".join(tokens(text)) for text in predictions], [" ".join(tokens(text)) for text in references]
    logging.getLogger().setLevel(logging.ERROR)  # codebleu warns on the root logger of every method without data flow
    bleu = sacrebleu.corpus_bleu(spaced[0], [spaced[1]], tokenize="none", force=True).score / 100
    code = calc_codebleu(list(references), list(predictions), lang=language, tokenizer=tokens)
    rouge, pairs = RougeScorer(["rougeL"], tokenizer=_Words()), list(zip(references, predictions, strict=True))
    meteor = [single_meteor_score(tokens(r), tokens(p), wordnet=_NoSynonyms()) for r, p in pairs]
    return {
        "BLEU": bleu,
        "CodeBLEU": code["codebleu"],
        "METEOR": sum(meteor) / len(pairs),
        "ROUGE-L": sum(rouge.score(r, p)["rougeL"].fmeasure for r, p in pairs) / len(pairs),
        "exact": sum(tokens(r) == tokens(p) for r, p in pairs) / len(pairs),
    }


def translate(
    whole: Whole, tests: Mapping[str, Path], arms: Mapping[str, Path], out: Path, *, max_new_tokens: int
) -> dict[tuple[str, str], dict[str, float]]:
    """Let every arm translate every party's test rows; (arm, party) -> metrics. What was written is kept in `out`."""
    found = {}
    for arm, pattern in {BEFORE: Path(), **arms}.items():
        for party, file in tests.items():
            rows = lines(file)
            with whole.tuned(None if arm == BEFORE else Path(str(pattern).replace("{party}", party))) as model:
                made = whole.answers(model, [row["prompt"] for row in rows], max_new_tokens=max_new_tokens)
            made = [text.strip() for text in made]
            write(out / f"{arm}.{party}.jsonl", [{**r, "made": m} for r, m in zip(rows, made, strict=True)])
            found[arm, party] = scores(made, [row["completion"] for row in rows])
    return found


def table(found: Mapping[tuple[str, str], Mapping[str, float]]) -> Table:
    """One line an arm: each metric, as the mean over the parties, and BLEU of each party."""
    parties = list(dict.fromkeys(party for _, party in found))
    shown = Table("translations", *METRICS, *(f"BLEU {party}" for party in parties))
    for arm in dict.fromkeys(arm for arm, _ in found):
        means = [sum(found[arm, party][metric] for party in parties) / len(parties) for metric in METRICS]
        shown.add_row(arm, *(f"{value:.3f}" for value in [*means, *(found[arm, p]["BLEU"] for p in parties)]))
    return shown


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m examples.code_translation.score")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--kit", type=Path, required=True)
    parser.add_argument("--test", action="append", required=True, metavar="PARTY=FILE")
    parser.add_argument("--arm", action="append", required=True, metavar="NAME=ADAPTER", help="as for examples.compare")
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("translations"), help="folder for what was written")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    whole, tests, arms = Whole(given.model, given.kit), named(given.test), named(given.arm)
    compared = compare(whole, tests, arms, max_length=given.max_length)
    found = translate(whole, tests, arms, given.out, max_new_tokens=given.max_new_tokens)
    console = Console(width=120)
    console.print(losses(compared), table(found))
    if given.json is not None:
        made = [
            Result(case=f"{arm}/{party}", metric=metric, value=value, unit="share")
            for (arm, party), metrics in found.items()
            for metric, value in metrics.items()
        ]
        write_results(given.json, "examples.code_translation.score", vars(given), [*figures(compared), *made])


if __name__ == "__main__":
    main()
