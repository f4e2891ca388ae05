"""Prose, signs, spaces and separators, for `corpus`. All written for this purpose.

Every text but `DECOMPOSED` is in normal form C: llama.cpp never normalizes, and the tokenizers
that do would differ from it on the others.
"""

from __future__ import annotations

PROSE: tuple[str, ...] = (
    "Hello, world! I've, you're, we'll, he'd, I'm, it's, can't; I'VE, WE'LL, don't-you's.",
    'The quick fix (v2.1) wasn\'t "final": 3 of 10 tests failed at 12:45, i.e. 30%. See §4, p. 17!',
    "Größe Straße Ünal naïve café œuvre Łódź Čeština İstanbul ıǆǅ Æsir ĳs ñandú ﬁn",
    "Việt Nam: tiếng Việt có nhiều dấu thanh.",
    "你好，世界！这是一个测试。我们在学习编程：首先，定义一个函数；然后调用它。",
    "輸入一個整數陣列nums和一個整數k，返回「和」為k的子陣列個數（1 ≤ k ≤ 10⁵）。",
    "日本語のテキストとカタカナ、ｶﾀｶﾅ。々〇ー・「引用」",
    "안녕하세요 세계 ㄱㄴㄷ 한국어로 주석을 씁니다.",
    "Привет, мир! Ёлка. Функция возвращает сумму чисел, если n > 0; иначе — ошибку.",
    "Їжак ґанок, България, Ѝ Ђорђе; қазақ",
    "Καλημέρα κόσμε· ΣΊΣΥΦΟΣ ς",
    "مرحبا بالعالم، كيف حالك؟ ٣٤٥",
    "שלום עולם ״מרכאות״",
    "नमस्ते दुनिया। क्षत्रिय ०१२",
    "বাংলা தமிழ் తెలుగు ಕನ್ನಡ മലയാളം ગુજરાતી ਪੰਜਾਬੀ සිංහල",
    "สวัสดีชาวโลก ๑๒๓ ລາວ မြန်မာ ខ្មែរ བོད་ཡིག",
    "Հայերեն ქართული አማርኛ ᎣᏏᏲ ꭰ ⲁⲃ 𐐷 𝒳𝔸 𓀀 ᠮᠣᠩᠭᠣᠯ",
    "English中文mixed混合текст한국어123and変数x1",
    "# 計算する\nx = 合計(数1, 数2)  # 注释：求和\nprint(f'结果是{x}')\n",
)

SIGNS: tuple[str, ...] = (
    "🙂👍🏽👩‍👩‍👧‍👦🇩🇪 ok 🚀🚀 ✈️ #️⃣ 1️⃣ 🏴‍☠️ ♪♫",
    "fix: 🐛 bug 🔥🔥🔥!!! (✅ done, ❌ not)",
    "“quotes” — dash … ‹x› «y» ¿qué? ¡sí! ‘a’ „b“ 'c'",
    "€100 £20 ¥3 § ¶ © ® ™ ± × ÷ ≠ ≤ ∑ √ → ⇒ ∞ ∂x/∂y ⟨a|b⟩",
    "┌─┬─┐\n│ │ │\n└─┴─┘ █▓▒░ ⠋⠙⠹ ●○ ✓✗",
    "x=1;y+=2;z**=3;w<<=4;a==b!=c<=d>=e~f^g|h&i@j$k`l\\m",
    "a->b; c=>d; e::f; g?.h; i??j; k&&l||!m; n...o; p//q; r/*s*/; #t; $u; %v; <w>; {{x}}; [[y]]",
    "http://user:pw@example.org:8080/a/b.html?q=1&r=%20#top C:\\Users\\x ~/.ssh me@example.org",
    "a" * 100,
    "=" * 70,
    "-" * 33 + "+" * 33,
    "*" * 17 + "/" + "#" * 80,
    "_" * 9 + "__init__" + "." * 12,
    "日" * 50,
)

NUMBERS: tuple[str, ...] = (
    *("0", "12", "123", "1234567890", "3.14159", "1,000,000", " 42", "v1.2.3-rc4", "٣٤٥", "½²Ⅷ"),
    "0xDEADBEEF 0b1010 0o777 1e-9 1_000 .5 5. 1.2.3.4 2024-01-31T23:59:59.999Z 007 1st 2nd",
    "a1b2c3 x86_64 utf8 i18n 3D 100% 5kg -1 +1 ১২৩ ௧௨ 一二三 ①②③ 𝟘𝟙 ٪",
)

# Marks that make no single letter with what is before them.
MARKS: tuple[str, ...] = (
    "x\u0301q\u0323\u0308z\u0336 q\u20d0\u20e3",
    "\u0301 alone, \u0301\u0302 twice, 1\u0301 .\u0301 \n\u0301",
    "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd \u0643\u0650\u062a\u0651\u0627\u0628",
    "\u0915\u094d\u0937\u093f \u0e01\u0e33 \u0b95\u0bcd a\ufe0f\u200d",
)
DECOMPOSED = "cafe\u0301 u\u0308ber n\u0303"

SPACES: tuple[str, ...] = (
    *("", " ", "  ", "\n", "\n\n\n", "\r\n", "\r", "\r\n\r\n  \r\n", "\t\t \t", " \n  \n   \n"),
    "a  b   c    d     e",
    "   leading",
    "trailing   ",
    "trailing \t\n",
    "x\n    y\n        z\n",
    "if x:\r\n    y = 1\r\n\r\n\telse\r\n",
    "a\rb\n\rc\r\r\n\nd",
    " " * 40 + "x",
    "x" + " " * 127 + "\n" + " " * 300 + "y",
    "\n" * 20,
    "\t" * 30 + "x\t" * 5,
    " \t" * 20,
    "\r\n" * 10,
)

SEPARATORS: tuple[str, ...] = (
    "a\u00a0b\u3000c\u2003d\u200be\u2028f",
    "next\u0085line\u0085\u0085 \u0085x\u0085 y",
    "line\u2028sep\u2028\u2028 \u2028x\u2028 y\u2029para\u2029\u2029 z\u2029 (\u2029)",
    "nbsp\u00a0\u00a0x \u00a0y\u00a0 z 1\u00a0000\u202f000,00\u00a0€",
    "en\u2002em\u2003fig\u2007hair\u200anarrow\u202fmath\u205fogham\u1680wide\u3000。\u3000x",
    "zero\u200bwidth\u200cnon\u200djoin\u2060er\ufeff",
    "form\x0cfeed\x0bvertical\x0b\x0c \x0b",
    "file\x1cgroup\x1drecord\x1eunit\x1f \x1f",
    "soft\u00adhyphen \u061c\u180emark",
)

CONTROLS: tuple[str, ...] = (
    "\x0b\x0c\x1c\x85",
    "\x00",
    "a\x00b\x00\x00 c\x00\n",
    "".join(map(chr, range(32))),
    "\x7f" + "".join(map(chr, range(0x80, 0xA0))),
    "\x1b[1;31mred\x1b[0m bell\x07 back\x08space",
    "\ufeffBOM \u202eRTL\u202c \u2066x\u2069 \ufff9a\ufffab\ufffb \ufffd\ufffe\uffff",
    "\ue000 \ue0a0\uf8ff x\U000f0000 \U0010fffd\U0010ffff \U000e0001\U000e0041",
    "\u0378 \u0530 \U0001ffff \U000effff \ud7ff\ue000",  # no code points of any letter
)

# The characters of DeepSeek Coder's 13 letter tokens, alone and in words.
LETTERS: tuple[str, ...] = (
    "õ÷ÁýÀÿøúþüùöû",
    "õ ÷ Á ý À ÿ ø ú þ ü ù ö û",
    "für schön Àpropos Ágnes où sûr þing søn ýmis último são 8÷2",
    "  ü\n\tö",
    "ü" * 40,
)
