"""Converts formulas of the catalogue's texts, such as
``-min(r·A, clip(r, 1-ε, 1+ε)·A)``, to LaTeX.

Text that is not a formula stays code.
"""

from __future__ import annotations

import re

NAMES = {
    "logp": r"\log p",
    "old_logp": r"\log p_{\text{old}}",
    "ref_logp": r"\log p_{\text{ref}}",
    "sampling_logp": r"\log p_{\text{sampling}}",
    "log_ratio": r"\log r",
}
GREEK = {
    "alpha": "α",
    "beta": "β",
    "gamma": "γ",
    "delta": "δ",
    "epsilon": "ε",
    "eta": "η",
    "lam": "λ",
    "mu": "μ",
    "tau": "τ",
}
WORDS = (
    "log",
    "exp",
    "min",
    "max",
    "clip",
    "mean",
    "std",
    "var",
    "sg",
    "sign",
    "sigmoid",
    "softmax",
    "softplus",
    "tanh",
    "cosh",
    "ceil",
    "floor",
)
WORDS += ("inf", "ln", "logsigmoid", "odds", "squash", "KL", "NLL")  # fmt: skip
BIG = {"Σ": r"\sum", "sum": r"\sum", "Π": r"\prod"}
RELATIONS = {
    "<": "<",
    ">": ">",
    "<=": r"\le",
    ">=": r"\ge",
    "!=": r"\ne",
    "≥": r"\ge",
    "≤": r"\le",
    "≠": r"\ne",
    " = ": "=",
    "∝": r"\propto",
}
RELATIONS |= {
    "<-": r"\leftarrow",
    "←": r"\leftarrow",
    "→": r"\to",
    "in": r"\in",
    ":": ":",
    "‖": r"\Vert",
}
POWERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
INDICES = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
OPEN = {"(": ")", "[": "]", "{": "}"}
TOKEN = re.compile(
    r"(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)|(?P<name>(?!Σ|Π|√)[^\W\d_⁰-₎²³¹½]+(?:_[^\W⁰-₎²³¹½]+)*(?:'+)?)"
    r"|(?P<power>[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+)|(?P<index>[₀-₉]+)|(?P<relation> = "
    r"|<=|>=|!=|<-|[<>≥≤≠∝←→:])|(?P<other>[-+±·/^_|‖√½ΣΠ(){}\[\],*~])"
)
SIGNS = {"-": "-", "+": "+", "±": r"\pm "}
#: A span has one of these, or is a symbol alone. f_dpo and f_distill are methods.
STRONG = re.compile(rf"[·²^√ΣΠσπ‖½⁺⁻∝≥≤←→]|[<>+/-]| = |\||^({'|'.join(WORDS)})[ (]")
SYMBOL = re.compile(rf"(?!f_)[^\W\d_](_[^\W_]+|[₀-₉])?|{'|'.join(NAMES)}")
SHAPE = re.compile(r"\[[A-Z0-9·,.+ ]*\]")


class NoFormula(ValueError):
    """The text is code."""


def latex(text: str) -> str | None:
    """The formula in LaTeX; None if the text is none."""
    if (
        SHAPE.fullmatch(text)
        or "->" in text
        or not (SYMBOL.fullmatch(text) or (STRONG.search(text) and re.search(r"[^\W\d_]", text)))
    ):
        return None
    try:
        return Formula(text).whole()
    except NoFormula:
        return None


def name(text: str) -> str:
    """A symbol or a function with its index; a keyword by its own name."""
    base, primes = text.rstrip("'"), text.count("'")
    head, _, index = base.partition("_")
    if base in NAMES:
        found = NAMES[base]
    elif len(index) > 1 and len(head) > 1 and head not in GREEK:
        found = rf"\text{{{base}}}"
    else:
        found = symbol(head) + (
            rf"_{{\text{{{index}}}}}" if len(index) > 1 else f"_{{{index}}}" if index else ""
        )
    return found + "'" * primes


def symbol(text: str) -> str:
    if text in BIG:
        return BIG[text]
    if text in WORDS:
        return rf"\operatorname{{{text}}}"
    found = NAMES.get(text) or GREEK.get(text)
    return found or (text if len(text) == 1 else rf"\text{{{text}}}")


class Formula:
    """Sums of products of powers, read from left to right. A space is a product, or a
    function's argument without parentheses.
    """

    def __init__(self, text: str) -> None:
        # kind, text, whether a space stands before it
        self.kinds: list[tuple[str, str, bool]] = []
        at, space = 0, False
        while at < len(text):
            match = TOKEN.match(text, at)
            if match is None and text[at] == " ":
                at, space = at + 1, True
                continue
            if match is None:
                raise NoFormula(text)
            kind = match.lastgroup or ""
            is_in = match[0] == "in" and space
            self.kinds.append(("relation" if is_in else kind, match[0], space))
            at, space = match.end(), False
        self.text, self.at = text, 0
        if re.search(r"[^\W\d_]{2}-[^\W\d_]{2}", text):  # log-ratio is one word
            raise NoFormula(text)

    @property
    def now(self) -> tuple[str, str, bool]:
        return self.kinds[self.at] if self.at < len(self.kinds) else ("end", "", False)

    def take(self, wanted: str | None = None) -> str:
        kind, text, _ = self.now
        if kind == "end" or (wanted is not None and text != wanted):
            raise NoFormula(self.text)
        self.at += 1
        return text

    def whole(self) -> str:
        found = self.relation()
        if self.now[0] != "end":
            raise NoFormula(self.text)
        return found

    def relation(self, norm: bool = False) -> str:
        """Sums with relations between them; ``KL(p‖q)`` has one, ``‖x‖`` does not."""
        found = self.sum()
        while self.now[0] == "relation" or (self.now[1] == "‖" and not norm):
            found += f" {RELATIONS[self.take()]} {self.sum()}"
        return found

    def sum(self) -> str:
        found = ""
        if self.now[1] in SIGNS:
            found = SIGNS[self.take()]
        found += self.quotient()
        while self.now[1] in SIGNS:
            sign = SIGNS[self.take()]
            # q+, the positive ones
            if self.now[0] == "end" or self.now[1] in ("}", ")"):
                return f"{found}^{{{sign}}}"
            found += f" {sign} {self.quotient()}"
        return found

    def quotient(self) -> str:
        """A ``/`` between spaces divides all that stands before it."""
        found = self.product()
        while self.now[1] == "/" and self.now[2]:
            self.take()
            found = rf"\frac{{{bare(found)}}}{{{bare(self.product())}}}"
        # a divisor that an option takes away
        if [text for _, text, _ in self.kinds[self.at : self.at + 2]] == ["[", "/"]:
            self.at += 2
            found += rf" \, [/ {self.product()}]"
            self.take("]")
        return found

    def product(self) -> str:
        """Factors, with a point or a space between them."""
        factors, argument = [], False
        while True:
            factor, is_function = self.fraction(argument)
            factors.append(factor)
            if self.now[1] == "·":
                self.take()
                factors.append(r"\cdot")
                argument = False
            elif self.starts():
                argument = argument or is_function
                factors.append(r"\,")
            else:
                return " ".join(factors)

    def fraction(self, argument: bool) -> tuple[str, bool]:
        """On one line in an exponent, and in an argument without parentheses, where
        what is divided is the function's value or its argument.
        """
        factor, is_function = self.power()
        while self.now[1] == "/" and not self.now[2]:
            self.take()
            below, is_function = self.power()
            while is_function and self.starts():
                more, is_function = self.power()
                below += rf" \, {more}"
            factor = (
                f"{factor}/{below}"
                if argument or self.small
                else rf"\frac{{{bare(factor)}}}{{{bare(below)}}}"
            )
        return factor, is_function

    def starts(self) -> bool:
        """Whether a factor follows. A bar closes what a bar has opened."""
        kind, text, _ = self.now
        return (
            kind in ("name", "number")
            or text in ("Σ", "Π", "√", "½", "(", "{")
            or (text == "|" and not self.closing)
        )

    closing = small = False

    def power(self) -> tuple[str, bool]:
        """A factor with what is raised, indexed or called; and whether it is a function
        that was not called yet.
        """
        is_function = self.now[1].partition("_")[0] in (*WORDS, *BIG)
        found = self.atom()
        while True:
            kind, text, space = self.now
            if space or kind == "end":
                return found, is_function
            if text == "^":
                self.take()
                found = f"{found}^{{{self.raised()}}}"
            elif text == "_" or kind == "index":
                self.take()
                found += (
                    f"_{{{text.translate(INDICES)}}}"
                    if kind == "index"
                    else f"_{{{self.raised()}}}"
                )
            elif kind == "power":
                found += f"^{{{self.take().translate(POWERS)}}}"
            elif text == "*":
                self.take()
                found += "^{*}"
            elif text == "~":
                self.take()
                found = rf"\tilde{{{found}}}"
            elif text in ("(", "["):
                found, is_function = found + self.group(), False
            else:
                return found, is_function

    def raised(self) -> str:
        """An exponent or an index: one factor, or a group without its parentheses."""
        sign = SIGNS[self.take()] if self.now[1] in SIGNS else ""
        outer, self.small = self.small, True
        found = bare(self.group()) if self.now[1] in OPEN else self.atom()
        self.small = outer
        return sign + found

    def atom(self) -> str:
        kind, text, _ = self.now
        if kind == "name":
            return self.named(self.take())
        if kind == "number":
            found = self.take()
            if found == "1" and self.now[1] == "[":  # of a condition
                return r"\mathbf{1}"
            return re.sub(r"^1e(-?\d+)$", r"10^{\1}", found)
        if text in OPEN:
            return self.group()
        if text in ("Σ", "Π"):
            return BIG[self.take()]
        if text == "½":
            self.take()
            return r"\frac{1}{2}"
        if text == "√":
            self.take()
            return rf"\sqrt{{{self.atom()}}}"
        if text in ("|", "‖"):
            self.take()
            outer, self.closing = self.closing, True
            inside = self.relation(norm=True)
            self.closing = outer
            self.take(text)
            return enclosed(BAR[text] + " ", inside, " " + BAR[text])
        raise NoFormula(self.text)

    def named(self, text: str) -> str:
        if text == "sqrt" and self.now[1] == "(":
            return rf"\sqrt{{{bare(self.group())}}}"
        return r"\infty" if text == "inf" and self.now[1] != "{" else name(text)

    def group(self) -> str:
        opened = self.take()
        parts = [self.relation()]
        while self.now[1] == ",":
            self.take()
            parts.append(self.relation())
        self.take(OPEN[opened])
        braces = "\\" if opened == "{" else ""
        return enclosed(f"{braces}{opened}", ", ".join(parts), f"{braces}{OPEN[opened]}")


def enclosed(opened: str, inside: str, closed: str) -> str:
    """As high as what is inside, where that is higher than a line."""
    high = "\\frac" in inside or "\\sum" in inside or "\\prod" in inside
    return rf"\left{opened} {inside} \right{closed}" if high else f"{opened}{inside}{closed}"


BAR = {"|": r"\vert", "‖": r"\Vert"}


def bare(text: str) -> str:
    """Without the parentheses that enclose it all."""
    match = re.fullmatch(r"(?:\\left)?\\?[({] ?(.*?) ?(?:\\right)?\\?[)}]", text, re.S)
    depth = 0
    for part in "" if match is None else re.sub(r"\\text{[^}]*}", "", match[1]):
        depth += {"(": 1, "{": 1, ")": -1, "}": -1}.get(part, 0)
        if depth < 0:
            return text
    return text if match is None or depth else match[1]
