"""Which project a pair of methods is from, told by names that only that project has. A rule, not a truth.

The rows of CodeXGLUE say nothing about their origin. Each project is known by words that stand in its code: package
names where the C# side spells them out, else classes and helpers that are its own. The first project whose words occur
wins, in the order below; a pair without any such word is placed nowhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

_AWS = r"\bbeforeClientExecution\b|\bInvokeOptions\b|\bnew \w+Request\(\)\.with[A-Z]"
_ALIYUN = r'super\("[\w-]+", "\d{4}-\d\d-\d\d"|\bMethodType\.|\bProtocolType\.HTTPS\b'
_JGIT = (
    r"\bNGit\b|\bJGit\w*|\b(?:AnyObjectId|ObjectId|RevCommit|RevWalk|RevTree|RevTag|RevObject|RevFlag|RevFilter|RevSort"
    r"|TreeFilter|TreeWalk|PersonIdent|RefUpdate|RefSpec|RefDatabase|DirCache\w*|PackConfig|PackFile|GitAPIException"
    r"|URIish|FileMode|ReceiveCommand|RawParseUtils|RawText|CanonicalTreeParser|ProgressMonitor|ObjectReader"
    r"|ObjectInserter|ObjectLoader|TransferConfig|CredentialItem|RemoteConfig|ReflogEntry|checkCallable"
    r"|IncorrectObjectTypeException|MissingObjectException|UploadPack|ReceivePack|Ref)\b"
)
_ANTLR = (
    r"\bAntlr4\b|\bANTLR\w*|\b(?:ATN\w*|RuleContext|ParserRuleContext|PredictionContext|SemanticContext|IntervalSet"
    r"|ParseTree\w*|TerminalNode|TokenSource|RecognitionException|LexerATN\w*|DFA\w*|IntStream|CharStream"
    r"|TokenStreamRewriter|CommonToken\w*|Recognizer|DecisionInfo|LexerAction\w*|RuleTagToken|ListTokenSource"
    r"|BufferedTokenStream|Lexer)\b"
)
_POI = (
    r"\bNPOI\b|\b(?:HSSF\w*|XSSF\w*|POI\w*|\w+Ptg|\w+Pxg|Escher\w*|LittleEndian\w*|ValueEval|NumberEval|ErrorEval"
    r"|StringEval|BoolEval|RefEval|AreaEval|BlankEval|OperandResolver|EvaluationException|RecordInputStream|HexDump"
    r"|CellRangeAddress\w*|CellReference|\w+Record|RecordFormatException|UnicodeString|PropertyIDMap"
    r"|SpreadsheetVersion|OperationEvaluationContext|FreeRefFunction|DVConstraint|RecordVisitor|\w*RecordAggregate"
    r"|FormulaParser|DataFormatter|BitField\w*|WorkbookEvaluator|EvaluationCell|CellValueRecordInterface|Workbook"
    r"|ConditionalFormattingRule|CFRecordsAggregate|CellType)\b"
)
_LUCENE = (
    r"\bLucene\b|\b(?:BytesRef\w*|CharsRef\w*|IntsRef|LeafReader\w*|AtomicReader\w*|IndexReader|IndexWriter\w*"
    r"|IndexSearcher|IndexInput|IndexOutput|DirectoryReader|TermsEnum|DocIdSet\w*|PostingsEnum|DocsEnum|FST"
    r"|Similarity\w*|BasicStats|SrndQuery|QueryNode\w*|TokenFilter|TokenStream|CharTermAttribute|CharArraySet"
    r"|RamUsageEstimator|FieldInfos?|FieldType|SegmentInfo\w*|StoredField|SpanQuery|BooleanQuery|TermQuery|PhraseQuery"
    r"|Automaton|PackedInts|AttributeSource|CollectionStatistics|TermStatistics|DataInput|DataOutput|ByteBlockPool"
    r"|FacetLabel|EscapeQuerySyntax|BasicQueryFactory|GroupingSearch|ValueSource|MutableValue|IndexFileNames"
    r"|ResourceLoader|Analyzer|IndexableField|CodecUtil|UnicodeUtil|TokenMgrError|jj\w+|JJCalls|clearAttributes"
    r"|termAtt|[Oo]uterInstance|MergePolicy|IndexCommit|Scorer|Collector|MergeState|\w*DocValues|SnowballProgram"
    r"|find_among\w*|slice_del|slice_from|eq_s)\b"
)
PROJECTS = {
    name: re.compile(words)
    for name, words in {
        "aws": _AWS, "aliyun": _ALIYUN, "jgit": _JGIT, "antlr": _ANTLR, "poi": _POI, "lucene": _LUCENE,
    }.items()
}  # fmt: skip
"""Words of each project, in the order in which they are asked; ports of Harmony and of Android are not among them."""

PARTIES = {"search": ("lucene", "antlr"), "office": ("poi",), "services": ("jgit", "aws", "aliyun")}
"""The projects that each party holds."""


def project_of(java: str, cs: str = "") -> str | None:
    """The project that a pair of methods is from, or None."""
    text = f"{java}\n{cs}"
    return next((name for name, words in PROJECTS.items() if words.search(text)), None)


def party_of(row: dict[str, Any]) -> str | None:
    """The party that holds a row with `java` and `cs`, or None."""
    project = project_of(row["java"], row["cs"])
    return next((party for party, held in PARTIES.items() if project in held), None)


def placed(rows: Iterable[dict[str, Any]]) -> Counter[str]:
    """How many rows each project has; those of none under ``-``."""
    return Counter(project_of(row["java"], row["cs"]) or "-" for row in rows)
