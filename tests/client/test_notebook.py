"""HTML for notebooks: escaped, static."""

from html.parser import HTMLParser

import pytest

from jobsched import errors
from jobsched.client.client import Client
from jobsched.client.notebook import Listing, job_html
from jobsched.core.job import Phase
from tests.client.fake_server import ID, FakeServer, a_node, an_answer


class Balanced(HTMLParser):
    """Checks that tags are closed and collects the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(html: str) -> Balanced:
    page = Balanced()
    page.feed(html)
    page.close()
    assert page.open == []
    return page


def test_a_job_is_a_card_with_state_progress_timeline_and_replicas() -> None:
    page = parse(job_html(an_answer(step=40, headline="40 of 100", first_started_at_ms=1_767_225_601_000)))
    assert {"svg", "table"} <= page.tags
    for text in ("bert", ID, "RUNNING", "step 40 of 100", "loss 0.5", "worker/1", "n01"):
        assert text in page.text


def test_what_people_write_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    html = job_html(an_answer(step=1, name=evil, headline=evil))
    assert "<script" not in html
    assert evil in parse(html).text
    listing = Listing(Client(remote=FakeServer(jobs={ID: an_answer(name=evil)}).remote()).jobs())
    assert "<script" not in listing._repr_html_()


@pytest.mark.parametrize("phase", list(Phase))
def test_every_phase_has_a_pill(phase: Phase) -> None:
    assert phase in parse(job_html(an_answer(phase))).text


def test_listings_are_tables() -> None:
    page = parse(Listing([a_node()])._repr_html_())
    assert "n01" in page.text
    assert parse(Listing()._repr_html_()).text == "nothing to show"


def test_frames_need_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(errors.MissingExtra, match="pandas"):
        Listing([a_node()]).to_frame()


def test_live_prints_where_there_is_no_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    Client(remote=FakeServer(jobs={ID: an_answer(Phase.SUCCEEDED)}).remote()).job(ID).live()
    assert "SUCCEEDED" in capsys.readouterr().out


def test_a_node_is_a_row_of_what_it_has_and_what_is_free() -> None:
    row = Listing([a_node()]).rows()[0]
    assert (row["name"], row["state"], row["gpus"], row["free_gpus"]) == ("n01", "ready", 2, 1)
    assert (row["cpus"], row["free_cpus"], row["memory_gib"], row["free_memory_gib"]) == (8, 4, 32, 16)
