"""Passwords, tokens and signatures in text: found, so that configs with them are refused, and masked wherever we print.

What is masked has the shape of a known secret, or is where one is expected: in an address, after a telling name, in a header.
A secret without either cannot be distinguished from other text. What a pattern looks ahead is bounded: the text may be long.
"""

import re

# In front of a value: it is not masked already
_DONE = r"(?!\*\*\*(?:[@:&#;\s\"'<>,)\]}]|$))"
# A name begins here, or a part of it after an underscore
_WORD = r"(?<![^\W_])"
_VALUE = rf"{_DONE}(?:\"[^\"\n]+\"|'[^'\n]+'|[^\s\"'<>&;]+)"
# What code and configs say in place of a secret
_NOTHING = r"(?!(?:none|null|true|false|str)\b)"
# Names whose value is a secret wherever they stand
_STRONG = (
    r"(?:password|passwd|pwd|passphrase|secret|client[_-]?secret|(?:access|refresh|id|auth|session|private|security)[_-]?token"
    r"|api[_-]?key|(?:secret|shared)[_-]?(?:access[_-]?)?key|account[_-]?key|shared[_-]?access[_-]?signature)"
)
# Names whose value is one in an address: elsewhere `key=value` and `token=3` are ordinary words
_IN_QUERY = (
    r"(?:x-amz-(?:signature|credential|security-token)|x-goog-(?:signature|credential)|sig|signature|awsaccesskeyid"
    rf"|key|auth|token|{_STRONG})"
)
_SCHEME = r"(?:basic|bearer|digest|negotiate|token|aws4-hmac-sha256)"
_SECRETS = (
    # http://token:@host and http://token:x-oauth-basic@host
    re.compile(rf"(?i)(?P<before>\bhttps?://){_DONE}[^/\s:\"'<>?#@]{{1,1000}}(?=:(?:x-oauth-basic)?@)"),
    # scheme://user:password@host, where the password may hold another @, or even a /
    re.compile(rf"(?<=://)(?P<before>[^/@:\s\[]*:){_DONE}[^/\s\"'<>]{{1,1000}}(?=@)"),
    re.compile(rf"(?<=://)(?P<before>[^/@:\s\[]*:){_DONE}(?!\d{{1,5}}(?:[/?#\s]|$))(?![/\\])[^\s\"'<>]{{1,1000}}(?=@)"),
    # http://token@host
    re.compile(rf"(?i)(?P<before>\bhttps?://){_DONE}[^/\s:\"'<>?#]{{1,1000}}(?=@)"),
    re.compile(rf"(?i)(?P<before>[?&#]{_IN_QUERY}=){_DONE}[^&#\s\"'<>]+"),
    # name=value, --name value, "name": "value" and, if the value has a digit, name: value
    re.compile(rf"(?i)(?P<before>{_WORD}{_STRONG}[\"']?\s*=(?!=)\s*){_NOTHING}{_VALUE}"),
    re.compile(rf"(?i)(?P<before>--{_STRONG}\s+)(?!-){_VALUE}"),
    re.compile(
        rf"(?i)(?P<before>{_WORD}{_STRONG}[\"']?\s*:\s*)(?=[\"'][^\s\"']|[^\s\"'<>&;]{{0,200}}\d){_NOTHING}{_VALUE}"
    ),
    re.compile(rf"(?P<before>\b[A-Z][A-Z0-9_]*_(?:TOKEN|ACCESS_KEY)=)(?!\d+\b){_VALUE}"),
    re.compile(rf"(?i)(?P<before>{_WORD}token=)(?=[^\s\"'<>&;]{{0,200}}\d)(?=[^\s\"'<>&;]{{8}}){_VALUE}"),
    re.compile(
        rf"(?i)(?P<before>\bauthorization[\"']?\s*[:=]\s*[\"']?(?:{_SCHEME}\s+)?)(?!{_SCHEME}\s){_DONE}[^\s\"',]+"
    ),
    re.compile(r"(?i)(?P<before>\bbearer\s+)(?=[^\s\"']{0,200}\d)[\w.~+/=-]{6,}"),
    re.compile(r"(?i)(?P<before>\bsignature=)[0-9a-f]{32,}\b"),
    re.compile(r"(?P<before>)\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    re.compile(
        r"(?P<before>)\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{16,}"
        r"|sk-[\w-]{30,}|xox[abeprs]-[\w-]{10,}|AIza[\w-]{30,}|dapi[0-9a-f]{32}|eyJ[\w-]{5,}\.[\w-]{5,}\.[\w-]*)"
    ),
    re.compile(r"(?P<before>)-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"),
)

# Every secret has one of these: most texts, such as the names of files, have none and need no closer look
_SIGNS = re.compile(r"(?i)[=:]|--|bearer|akia|asia|hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox|aiza|dapi|eyj")


def has_secret(text: str) -> bool:
    """Whether a text holds what looks like a password, a token or a signature."""
    return masked(text) != text


def masked(text: str) -> str:
    """The text with *** in the place of what looks like a secret."""
    if not _SIGNS.search(text):
        return text
    for pattern in _SECRETS:
        text = pattern.sub(r"\g<before>***", text)
    return text
