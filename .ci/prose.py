"""Fails where code, comments, messages or config comments use a retired word.

The project writes in the field's terms; each retired word has a plainer one, printed with the finding. Checks names,
strings and comments of Python files and the comments of YAML files.

    python .ci/prose.py [FOLDER or FILE ...]
"""

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKED = ("trainer", "models", "data", "configs", "launch", ".ci/prose.py")

RETIRED = {
    r"told|tells?|telling": "reports, prints, is passed, knows",
    r"besides?": "next to, with, in addition to",
    r"go(?:es|ing)? on": "continues, resumes",
    r"beg[aiu]ns?|beginn?ings?": "starts, is initialized from, start",
    r"stands?|stood|standing": "is, holds, represents, is located",
    r"so many|as many as|so much as": "a count or a name",
    r"by itself": "alone, independently",
    r"anew": "again",
    r"deals? out|dealt|dealing out": "distributes, assigns",
    r"learnt": "trained on, learned",
    r"whatever|whoever|whichever": "regardless of, any",
    r"thereafter|thereupon|whereupon|upon": "then, after, on",
    r"in words": "as text, description",
    r"further tokens?": "multi-token prediction, MTP",
    r"what (?:is|was) (?:said|asked|taken|left)": "a noun",
    r"judg(?:ing|ed) texts?": "scoring, classifying",
    r"write with": "generate",
    r"nothing but|at hand|is nothing to": "only, available, does not depend on",
}
WORDS = re.compile(r"\b(?:" + "|".join(f"(?P<w{i}>{pattern})" for i, pattern in enumerate(RETIRED)) + r")\b", re.I)
NAMES = re.compile(r"^_*(?:told|beside|further_|thin_|begin(?:ning)?$|origins$|bodies$|anew|dealt)", re.I)
ALLOWED = {  # a term of the field, or text that is data
    "begin": re.compile(r"begin_(?:of|token)|fim_begin|<\W*\w*begin|begin of|BEGIN|-----|begin(?:ning)?_of", re.I),
    "began": re.compile(r'^"began"$'),  # key of a job's handle in job.json
    "beside": re.compile(r'^"beside"$'),  # saved name of the objective's parameters in checkpoints
}


def findings(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yields (line, word, better) of one file."""
    text = path.read_text()
    if path.suffix == ".yaml":
        pieces = [(n, line.partition("#")[2]) for n, line in enumerate(text.split("\n"), 1)]
    else:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        strings = (tokenize.STRING, tokenize.COMMENT, *(getattr(tokenize, n, -1) for n in ("FSTRING_MIDDLE",)))
        pieces = [(t.start[0], t.string) for t in tokens if t.type in strings]
        names = {t.string: t.start[0] for t in tokens if t.type == tokenize.NAME and NAMES.match(t.string)}
        yield from ((line, name, "a name in the field's terms") for name, line in names.items())
    for line, piece in pieces:
        for match in WORDS.finditer(piece):
            if any(a.search(piece[max(0, match.start() - 12) : match.end() + 12]) for a in ALLOWED.values()):
                continue
            index = next(i for i in range(len(RETIRED)) if match.group(f"w{i}"))
            yield line + piece.count("\n", 0, match.start()), match.group(), list(RETIRED.values())[index]


def main(arguments: list[str]) -> int:
    roots = [Path(a) for a in arguments] or [ROOT / folder for folder in CHECKED]
    files = [f for root in roots for f in ([root] if root.is_file() else sorted(root.rglob("*")))]
    count = 0
    for file in (f for f in files if f.suffix in (".py", ".yaml") and f != Path(__file__).resolve()):
        for line, word, better in findings(file):
            count += 1
            print(f"{file.relative_to(ROOT) if file.is_relative_to(ROOT) else file}:{line}: {word!r}: write {better}")
    print(f"{count} retired words" if count else "no retired words")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
