"""The playground: served by the server alone, without a word from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from live_server import key, serving, tiny_frozen_lm


@pytest.fixture(scope="module")
def live():
    """A server with keys: the page itself needs none."""
    with serving(tiny_frozen_lm(), keys=(key("admin"),)) as live:
        yield live


class Tags(HTMLParser):
    """All tags with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def page_of(live):
    with live.client() as client:
        response = client.get("/")
    assert response.status_code == 200
    parser = Tags()
    parser.feed(response.text)
    return response, parser.tags


def test_the_page_and_its_files_ask_nobody_else(live):
    response, tags = page_of(live)
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "http" not in policy
    used = {attrs[name] for _, attrs in tags for name in ("src", "href") if name in attrs}
    assert used
    with live.client() as client:
        for url in used | {"/static/compare.js"}:
            assert url.startswith("/static/")
            found = client.get(url)
            assert found.status_code == 200
            assert found.headers["content-security-policy"] == policy
            assert not re.search(r"(https?:)?//(?!www\.w3\.org/2000/svg)[a-z]", found.text.replace("// ", ""))
    # The policy forbids them, so they would not work.
    assert not [attrs for tag, attrs in tags if "style" in attrs or any(name.startswith("on") for name in attrs)]
    assert not [tag for tag, attrs in tags if tag == "style" or (tag == "script" and "src" not in attrs)]


def test_every_field_has_a_label(live):
    _, tags = page_of(live)
    labels = {attrs["for"] for tag, attrs in tags if tag == "label" and "for" in attrs}
    fields = [attrs for tag, attrs in tags if tag in ("input", "textarea", "select")]
    assert fields
    assert [attrs["id"] for attrs in fields if attrs["id"] not in labels] == []
    assert ("html", {"lang": "en"}) in tags


def test_nothing_but_the_page_is_served_from_its_folder(live):
    with live.client() as client:
        for name in ("nothing.js", "", "..%2fapp.py", "../app.py", "playground.html%00", "__init__.py"):
            assert client.get(f"/static/{name}").status_code == 404


def test_the_script_builds_no_html_out_of_texts(live):
    with live.client() as client:
        for name in ("playground.js", "compare.js"):
            text = client.get(f"/static/{name}").text
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text)
