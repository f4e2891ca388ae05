"""Texts on which tokenizers are known to differ. All written for this purpose."""

from __future__ import annotations

from dsq.tokenizer_port.vocabulary import TokenType, Vocabulary

_CODE = (
    'def add(a: int, b: int) -> int:\n    """Sum."""\n    return a + b  # ok\n',
    "class Führer:\n\tname = f'{self!r:>10}'\n\n\n\tdef __init__(self):\n\t\tpass\n",
    '#include <stdio.h>\nint main(void) {\n  printf("%5.2f\\n", 3.14159e-10);\n  return 0;\n}\n',
    'let x: Vec<&\'static str> = vec!["a", "b"]; // 0xFF_u8 && !y || z\n',
    "const f = async (x) => { await x?.y ?? `t${1 + 2}`; };\r\nexport default f;\r\n",
    "SELECT * FROM t WHERE a <> 'it''s' AND b >= 10 ORDER BY c DESC;",
    '<div class="a">&nbsp;</div>\n<!-- x --><br/>',
    "x=1;y+=2;z**=3;w<<=4;a==b!=c<=d>=e~f^g|h&i@j$k`l\\m",
    'package main\n\nimport "fmt"\n\nfunc main() { fmt.Println("hi") }\n',
    "all:\n\tgcc -O2 -o $@ $< 2>/dev/null || exit 1\n",
    '{"a": [1, 2.5, -3e10, null, true], "b": {"c": "\\u00e9\\n"}}',
)

_SPACES = (
    "",
    " ",
    "  ",
    "\n",
    "\n\n\n",
    "\r\n",
    "\r\n\r\n  \r\n",
    "\t\t \t",
    " \n  \n   \n",
    "a  b   c    d",
    "   leading",
    "trailing   ",
    "a\u00a0b\u3000c\u2003d\u200be\u2028f",
    "x\n    y\n        z\n",
    "\x0b\x0c\x1c\x85",
    " " * 40 + "x",
    "\n" * 20,
)

_NUMBERS = (
    "0",
    "12",
    "123",
    "1234567890",
    "3.14159",
    "1,000,000",
    " 42",
    "v1.2.3-rc4",
    "٣٤٥",
    "½²Ⅷ",
)

_WORDS = (
    "Hello, world! I've, you're, we'll, he'd, I'm, it's, can't; I'VE, WE'LL.",
    "Größe Straße Ünal naïve café œuvre Łódź Čeština",
    "cafe\u0301 u\u0308ber n\u0303",  # not in normal form C
    "你好，世界！这是一个测试。我们在学习编程。",
    "日本語のテキストとカタカナ、ｶﾀｶﾅ。",
    "안녕하세요 세계 ㄱㄴㄷ",
    "Привет, мир! Ёлка",
    "مرحبا بالعالم، كيف حالك؟",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "ᎣᏏᏲ ⲁⲃ 𐐷 𝒳𝔸",
    "English中文mixed混合текст한국어123",
    "🙂👍🏽👩‍👩‍👧‍👦🇩🇪 ok 🚀🚀",
    "“quotes” — dash … ‹x› «y» ¿qué? ¡sí!",
    "€100 £20 ¥3 § ¶ © ® ™ ± × ÷ ≠ ≤ ∑ √ → ⇒",
    "\ufeffBOM \u202eRTL\u202c \ue000 \U0010ffff",
    "a" * 100,
    "=" * 70,
    "-" * 33 + "+" * 33,
)

# The characters of DeepSeek Coder's 13 letter tokens, alone and in words.
_LETTERS = (
    "õ÷ÁýÀÿøúþüùöû",
    "õ ÷ Á ý À ÿ ø ú þ ü ù ö û",
    "für schön Àpropos Ágnes où sûr þing søn ýmis último são 8÷2",
    "  ü\n\tö",
)


def corpus(vocab: Vocabulary) -> list[str]:
    """The built-in texts, and the vocabulary's own special tokens alone and inside text."""
    special = [
        vocab.tokens[i] for i in vocab.ids_of_type(TokenType.CONTROL, TokenType.USER_DEFINED)
    ][:64]
    return [
        *(*_CODE, *_SPACES, *_NUMBERS, *_WORDS, *_LETTERS),
        *special,
        *(f"a {token} b{token}{token}\n" for token in special),
    ]
