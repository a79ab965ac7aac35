"""How published tokenizers split text before merging, in the regex dialect of `tokenizers` (Oniguruma).

In all of them only the first character of a non-space piece may be a space, and whitespace looks ahead only; so text can
be cut before a space that follows a non-space without changing any piece. The fast engines know these and no others.
"""

from __future__ import annotations

# tiktoken writes `\s++$` for trailing whitespace; in Oniguruma `$` would also match before a newline, and \s+(?!\S)
# already takes whitespace at the end, so the alternative falls away.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

O200K = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# Llama 3's, which OLMo 2 and others took over; of cl100k_base it has the meaning, not the spelling.
LLAMA3 = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# Qwen 2, 2.5 and 3: a piece for every digit.
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

KNOWN = (GPT2, O200K, LLAMA3, QWEN2)
