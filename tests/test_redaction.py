"""Which texts hold secrets, what stays readable of them, and which only look like it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.redaction import has_secret, masked
from pipeline.text import printable

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJodW50ZXIyIn0.c2lnbmF0dXJlLWh1bnRlcjI"
HEX = "0123456789abcdef" * 4

# A text with the secret in braces, and what must stay readable of it
SECRETS = (
    ("https://user:{hunter2}@example.org/photos.tar", "https://user: @example.org/photos.tar"),
    ("https://user:{hun@ter2}@example.org/photos.tar", "https://user: @example.org/photos.tar"),
    ("https://user:{h@un@ter2}@example.org:8443/a@b", "https://user: @example.org:8443/a@b"),
    ("https://user:{hunter/2}@example.org", "https://user: @example.org"),
    ("https://user:{hunter#2?}@example.org/x", "https://user: @example.org/x"),
    ("https://user:{12345}@example.org/x", "https://user: @example.org/x"),
    ("http://{hunter2}@example.org:5000/mlflow", "http:// @example.org:5000/mlflow"),
    ("http://{hunter@2}@example.org/mlflow", "http:// @example.org/mlflow"),
    ("https://{hunter2}:@example.org/x.git", "https:// @example.org/x.git"),
    ("https://{hunter2}:x-oauth-basic@example.org/x.git", "https:// @example.org/x.git"),
    ("redis://:{hunter2}@cache.example.org:6379/0", "redis:// @cache.example.org:6379/0"),
    ("postgresql+psycopg://mlflow:{hunter2}@db:5432/mlflow", "postgresql+psycopg://mlflow: @db:5432/mlflow"),
    ("https://example.org/a.tar?X-Amz-Signature={hunter2abc}&b=1", "https://example.org/a.tar?X-Amz-Signature= &b=1"),
    ("https://example.org/a?X-Amz-Credential={hunter2}&X-Amz-Date=20260101", "X-Amz-Date=20260101"),
    ("https://example.org/a?x-amz-security-token={hunter2}", "https://example.org/a?x-amz-security-token="),
    ("https://example.org/a?x-goog-signature={hunter2}", "https://example.org/a?"),
    ("s3://bucket/a?token={hunter2}", "s3://bucket/a?token="),
    ("https://example.org/a?key={hunter2}&page=2", "https://example.org/a?key= &page=2"),
    ("https://example.org/a?page=2&pwd={hunter2}", "https://example.org/a?page=2&pwd="),
    ("https://example.org/a?client_secret={hunter2}", "https://example.org/a?client_secret="),
    ("https://example.org/a?refresh_token={hunter2}", "https://example.org/a?refresh_token="),
    ("https://example.org/a?id_token={hunter2}", "https://example.org/a?id_token="),
    ("https://example.org/back#access_token={hunter2}&expires=3600", "https://example.org/back#access_token= &expires=3600"),
    ("https://x.blob.core.windows.net/a?sv=2&sig={hunter2%3D}&se=3", "https://x.blob.core.windows.net/a?sv=2&sig= &se=3"),
    ("AccountName=photos;AccountKey={hunter2+/abc==};EndpointSuffix=core", "AccountName=photos;AccountKey= ;EndpointSuffix=core"),
    ("SharedAccessSignature={sr=hunter2}&sig={hunter2}&se=1", "SharedAccessSignature= &se=1"),
    ("SharedAccessKey={hunter2abc=}", "SharedAccessKey="),
    ("password={hunter2}", "password="),
    ("connect to db with pwd={hunter2} now", "connect to db with pwd= now"),
    ("client_secret={hunter2}", "client_secret="),
    ("refresh_token = {hunter2}", "refresh_token ="),
    ("aws_secret_access_key={wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY}", "aws_secret_access_key="),
    ("AWS_SECRET_ACCESS_KEY={wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY} illm shard", "AWS_SECRET_ACCESS_KEY= illm shard"),
    ("MLFLOW_TRACKING_PASSWORD={hunter}", "MLFLOW_TRACKING_PASSWORD="),
    ("HF_TOKEN={hunter}", "HF_TOKEN="),
    ("tool --password {hunter2} --steps 5", "tool --password --steps 5"),
    ('{{"user": "a", "password": "{two words}"}}', '"user": "a", "password":'),
    ("password: {hunter2}", "password:"),
    ("Authorization: Basic {aHVudGVyOmh1bnRlcg==}", "Authorization: Basic"),
    ("curl -H 'Authorization: Bearer {hunter2}' https://example.org", "curl -H 'Authorization: Bearer https://example.org"),
    ("refused: Bearer {abc.def-hunter2}", "refused: Bearer"),
    ("x-amz-security-token: {IQoJb3JpZ2luX2VjEHunter2}", "x-amz-security-token:"),
    ("X-Api-Key: {hunter2hunter2}", "X-Api-Key:"),
    (f"the answer was {{{JWT}}} today", "the answer was today"),
    ("{glpat-abcdefghij0123456789}", ""),
    ("{xoxb-123456789012-abcdefghij}", ""),
    ("{xoxp-123456789012-abcdefghij}", ""),
    ("{AIzaSyA0123456789abcdefghijklmnopqrstuv}", ""),
    ("{AKIAABCDEFGHIJKLMNOP}", ""),
    ("{ghp_" + "a" * 36 + "}", ""),
    ("{github_pat_" + "a" * 40 + "}", ""),
    ("{hf_" + "a" * 34 + "}", ""),
    ("{sk-" + "a" * 40 + "}", ""),
    ("{dapi" + "0a" * 16 + "}", ""),
    ("{-----BEGIN RSA PRIVATE KEY-----\nMIIhunter2\n-----END RSA PRIVATE KEY-----}", ""),
)  # fmt: skip

ORDINARY = (
    "runs/shard",
    "s3://bucket/photos/*.tar",
    "s3://bucket/a@b",
    "https://example.org:8080/a?page=2",
    "https://example.org:8080/a@b",
    "http://[::1]:8080/a@b",
    "https://example.org/@someone",
    "models:/illm@champion",
    "models:/illm/3",
    "git@github.com:org/repo",
    "ssh://git@github.com/org/repo.git",
    "postgresql://mlflow@127.0.0.1:5432/mlflow",
    "sqlite:////home/me/runs/mlflow.db",
    "file:///home/a:b@c/photos",
    "docker://registry.example.org/illm:1.0@sha256:" + HEX,
    "someone@example.org",
    "me@node17",
    "expected key=value, for example fit.steps=100",
    "key=value",
    "tokens=4096",
    "max_tokens=4096 token_count=3",
    "token=3",
    "sort_key=name keys=3 monkey=1",
    "source: holds a password, token or signature, which would be recorded",
    "the password: see the administrator",
    "password=None",
    "signature=ModelSignature(inputs=column, outputs=column)",
    "bearer certificates were issued",
    "author=hunter authorization is needed",
    "?sigma=3&keyboard=us&signal=4",
    "https://example.org/a?max_keys=10&monkey=3",
    "x-amz-date: 20260101T000000Z",
    "task-0123456789012345678901234567890123",
    "eyJust.a.test",
    HEX,
    "-----BEGIN CERTIFICATE-----",
    "***",
    "http://***@example.org",
)


def taken_apart(marked: str) -> tuple[str, list[str]]:
    """The text without its marks, and the secrets that they marked."""
    text = marked.replace("{{", "\0").replace("}}", "\1")
    pieces = text.replace("}", "{").split("{")
    return "".join(pieces).replace("\0", "{").replace("\1", "}"), pieces[1::2]


@pytest.mark.parametrize(("marked", "readable"), SECRETS)
def test_secrets_are_noticed_and_masked_and_the_rest_stays_readable(marked, readable):
    secret_text, secrets = taken_apart(marked)
    for text in (secret_text, f"before {secret_text} after", f"a line\n{secret_text}\nanother line"):
        shown = masked(text)
        assert has_secret(text), text
        assert not has_secret(shown), shown
        assert "***" in shown
        assert not any(secret in shown for secret in secrets), shown
        for word in readable.split():
            assert word in shown, shown
    assert masked(f"before {secret_text}").startswith("before ")
    assert masked(f"{secret_text} after").endswith(" after")


@pytest.mark.parametrize("text", ORDINARY)
def test_what_only_looks_like_a_secret_is_left_alone(text):
    for around in (text, f"before {text} after"):
        assert masked(around) == around
        assert not has_secret(around)


@given(st.lists(st.sampled_from([taken_apart(marked)[0] for marked, _ in SECRETS] + list(ORDINARY)), max_size=4))
def test_nothing_is_left_of_several_secrets_in_one_text(texts):
    for separator in (" ", "\n", ", ", '" "'):
        assert not has_secret(masked(separator.join(texts)))


def test_names_of_others_cannot_steer_the_terminal():
    assert printable("illm\x1b[31m\x07\n\u202egpj.exe") == "illm\\x1b[31m\\x07\\n\\u202egpj.exe"
    assert printable("Größe, 写真 & photo.png") == "Größe, 写真 & photo.png"


@pytest.mark.slow
@pytest.mark.parametrize("piece", ["password:", "http://a:", "token=", "bearer ", "password ", "eyJaaaaa."])
def test_a_long_text_takes_no_longer_than_its_length_asks_for(piece):
    assert len(masked(piece * 100_000)) > 100_000  # seconds; hours if each piece looked through all that follow
