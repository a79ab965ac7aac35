"""What a document is made of where rows have columns: one of them, or several in a template."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from grist_data.document import REPLACEMENT, Document, valid_text


@dataclass(frozen=True)
class Columns:
    """The columns of a document and the literal text around them: one piece more than there are names.

    errors: 'strict' or 'replace', for what UTF-8 cannot hold. numbers: whether whole numbers count as texts.
    """

    names: tuple[str, ...]
    literals: tuple[str, ...]
    errors: str
    numbers: bool

    def document(self, values: Sequence[object], where: str, replaced: int = 0) -> Document:
        """The document of a row. values: in the order of `names`; where: file and row, for messages.

        replaced: U+FFFD that stand in the row, at most, for what could not be read.
        """
        if len(self.names) == 1 and isinstance(values[0], str) and values[0].isascii() and not self.numbers:
            return Document(values[0], where, "files")  # the common case: nothing to check, nothing around it
        pieces, halves = [self.literals[0]], 0
        for name, value, literal in zip(self.names, values, self.literals[1:], strict=True):
            text = self._checked(value, name, where)
            if text is not value and isinstance(value, str):
                halves += text.count(REPLACEMENT) - value.count(REPLACEMENT)
            pieces += [text, literal]
        text = "".join(pieces)
        return Document(text, where, "files", min(replaced, text.count(REPLACEMENT)) + halves)

    def _checked(self, value: object, name: str, where: str) -> str:
        if self.numbers and type(value) is int:
            return str(value)
        if not isinstance(value, str) and self.numbers:
            raise ValueError(
                f"{where}: expected a text or a whole number in {name!r}, but got {type(value).__name__} ({value!r:.60})"
            )
        return valid_text(value, where, self.errors)


def columns_of(text_column: str | None, template: str | None, errors: str) -> Columns:
    """One column ('text' where nothing is given), or those that a template names in braces.

    Raises ValueError where both are given, and for a template that names no column or is malformed.
    """
    if template is None:
        return Columns((text_column or "text",), ("", ""), errors, numbers=False)
    if text_column is not None:
        raise ValueError(f"give text_column ({text_column!r}) or template ({template!r}), not both")
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {template!r} is malformed: {error}; a literal brace is written twice") from error
    names, literals = [], [""]
    for literal, name, specification, conversion in fields:
        literals[-1] += literal
        if name is None:
            continue
        if not name or specification or conversion:
            raise ValueError(
                f"template {template!r}: expected plain column names in braces, as in {{title}}, but got"
                f" {{{name}{'!' + conversion if conversion else ''}{':' + specification if specification else ''}}}"
            )
        names.append(name)
        literals.append("")
    if not names:
        raise ValueError(f"template {template!r} names no column: expected names in braces, as in {{title}}")
    return Columns(tuple(names), tuple(literals), errors, numbers=True)
