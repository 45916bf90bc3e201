"""Passwords, tokens and signatures in text: found, so that configs with them are refused, and masked wherever we print."""

import re

_SECRETS = (
    re.compile(r"(?<=://)(?P<before>[^/@:\s]*:)[^/@\s]+(?=@)"),  # scheme://user:password@host
    re.compile(
        r"(?i)(?P<before>[?&](?:x-amz-(?:signature|credential|security-token)|x-goog-(?:signature|credential)|sig|signature"
        r"|awsaccesskeyid|token|access_token|api_?key|password|secret)=)[^&\s\"']+"
    ),
    re.compile(r"(?P<before>)\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    re.compile(
        r"(?P<before>)\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|sk-[A-Za-z0-9_-]{30,})"
    ),
    re.compile(r"(?P<before>)-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"),
)


def has_secret(text: str) -> bool:
    """Whether a text holds what looks like a password, a token or a signature."""
    return any(pattern.search(text) for pattern in _SECRETS)


def masked(text: str) -> str:
    """The text with *** in the place of what looks like a secret."""
    for pattern in _SECRETS:
        text = pattern.sub(r"\g<before>***", text)
    return text
