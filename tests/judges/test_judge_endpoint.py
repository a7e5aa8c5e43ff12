"""The endpoint judge against a server of the test's own on this machine: orders, retries, cache, cost, refusals."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from instruct_trl.judges import (
    Answer,
    EndpointJudge,
    Pair,
    compare_models,
    find_questions,
    rate_models,
    wording,
)
from instruct_trl.judges.endpoint import ReplyCache


class Server:
    """Answers chat requests with `reply(content of the user's message)`; `failures` are sent first."""

    def __init__(self):
        self.reply, self.failures, self.requests, self.headers, self.raw = lambda text: "", [], [], [], None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.headers.append(dict(self.headers))
                if outer.failures:
                    status, extra, *body = outer.failures.pop(0)
                    self.send_response(status)
                    for name, value in extra.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body[0] if body else b'{"error": "no such thing"}')
                    return
                outer.requests.append((self.path, body))
                content = outer.reply(body["messages"][-1]["content"])
                usage = {"prompt_tokens": 100, "completion_tokens": 10}
                raw = outer.raw or {"choices": [{"message": {"content": content}}], "usage": usage}
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(raw).encode())

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("openai._base_client.time.sleep", lambda seconds: server.slept.append(seconds))
    server = Server()
    server.slept = []
    yield server
    server.close()


def between(text, tag):
    return text.split(f"<{tag}>\n")[1].split(f"\n</{tag}>")[0]


def prefers(word):
    """A fair judge: the answer that holds `word`, wherever it stands."""
    return lambda text: f"Because.\nVerdict: {'A' if word in between(text, 'answer_a') else 'B'}"


PROMPTS = ["p", "q"]
ANSWERS = {"SFT": ["dull 1", "dull 2"], "PPO": ["bright 1", "bright 2"]}
PAIRS = [Pair(Answer("r", "bright 1"), Answer("r", "dull 1"))]


def test_a_fair_judge_wins_in_both_orders(server):
    server.reply = prefers("bright")
    judge = EndpointJudge(server.url, "judge-1", api_key="secret", options={"seed": 3})
    result = compare_models(judge, PROMPTS, ANSWERS, "SFT")["PPO"]
    assert result.outcomes == [1.0, 1.0]
    assert (result.judge, result.flipped) == ("judge-1", 0)
    assert len(server.requests) == 4
    path, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"], body["seed"]) == ("judge-1", 0.0, 3)
    assert server.headers[0]["Authorization"] == "Bearer secret"
    first = [between(body["messages"][-1]["content"], "answer_a") for _, body in server.requests]
    assert sorted(first) == ["bright 1", "bright 2", "dull 1", "dull 2"]


def test_a_judge_that_always_says_a_is_all_ties(server):
    server.reply = lambda text: "Verdict: A"
    result = compare_models(EndpointJudge(server.url, "j"), PROMPTS, ANSWERS, "SFT")["PPO"]
    assert result.outcomes == [0.5, 0.5]
    assert (result.win.ties, result.flipped) == (2, 2)


def test_one_order_asks_half_and_gives_each_model_both_places(server):
    server.reply = lambda text: "Verdict: A"
    answers = {"SFT": [f"dull {i}" for i in range(40)], "PPO": [f"bright {i}" for i in range(40)]}
    judge = EndpointJudge(server.url, "j", both_orders=False)
    result = compare_models(judge, ["p"] * 40, answers, "SFT")["PPO"]
    assert len(server.requests) == 40
    # Chance alone: 40 fair coins lie within 8 to 32 with a probability above 0.9999.
    assert 8 <= result.win.wins <= 32
    # The place is the pair's, not the model's: exchanged, the same requests are made and the outcomes are mirrored.
    mirrored = compare_models(judge, ["p"] * 40, answers, "PPO")["SFT"]
    assert len(server.requests) == 40
    assert mirrored.outcomes == [1 - outcome for outcome in result.outcomes]


def test_invalid_replies_are_counted_and_equal_answers_not_asked(server):
    server.reply = lambda text: "I would rather not." if "dull 1" in text else prefers("bright")(text)
    answers = {"SFT": ["dull 1", "dull 2", "same"], "PPO": ["bright 1", "bright 2", "same"]}
    result = compare_models(EndpointJudge(server.url, "j"), ["p", "q", "r"], answers, "SFT")["PPO"]
    assert result.outcomes == [None, 1.0, 0.5]
    assert result.invalid == 1
    assert len(server.requests) == 4


def test_a_second_run_costs_nothing_and_a_broken_one_goes_on(server, tmp_path):
    server.reply = prefers("bright")
    cache = tmp_path / "replies.jsonl"

    def judge():
        return EndpointJudge(server.url, "j", cache=cache, price_in=2.0, price_out=20.0, workers=1)

    first = judge()
    compare_models(first, PROMPTS, ANSWERS, "SFT")
    # 4 requests of 100 prompt and 10 completion tokens, at 2 and 20 a million.
    assert first.usage.cost == pytest.approx((400 * 2 + 40 * 20) / 1e6)
    again = judge()
    assert compare_models(again, PROMPTS, ANSWERS, "SFT")["PPO"].outcomes == [1.0, 1.0]
    assert (again.usage.requests, again.usage.cached, again.usage.cost) == (0, 4, 0.0)
    assert again.usage.saved == first.usage.cost
    # Killed while it wrote the third reply: two are kept, half a line is not.
    lines = cache.read_text().splitlines()
    cache.write_text("\n".join([*lines[:2], lines[2][:30]]))
    resumed = judge()
    compare_models(resumed, PROMPTS, ANSWERS, "SFT")
    assert (resumed.usage.requests, resumed.usage.cached) == (2, 2)
    assert len(ReplyCache(cache).replies) == 4


def test_replies_with_line_separators_are_kept(server, tmp_path):
    server.reply = lambda text: "One\u2028two\x85\ud800.\nVerdict: A"  # the last is half of a pair: no UTF-8 has it
    for requests, cached in ((4, 0), (0, 4)):
        judge = EndpointJudge(server.url, "j", cache=tmp_path / "replies.jsonl")
        compare_models(judge, PROMPTS, ANSWERS, "SFT")
        assert (judge.usage.requests, judge.usage.cached) == (requests, cached)


def test_a_key_is_trimmed_and_never_shown(server):
    server.reply = lambda text: "Verdict: A"
    compare_models(EndpointJudge(server.url, "j", api_key="secret\r\n"), PROMPTS, ANSWERS, "SFT")
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}
    for key in ("two\nlines", "\u201csecret\u201d"):
        with pytest.raises(ValueError, match="no header can carry") as caught:
            EndpointJudge(server.url, "j", api_key=key)
        assert key not in str(caught.value)


def test_other_settings_are_other_replies(server, tmp_path):
    server.reply = prefers("bright")
    cache = tmp_path / "replies.jsonl"
    for model, changes in (("j", {}), ("k", {}), ("j", {"temperature": 1.0}), ("j", {"criterion": "Be brief."})):
        judge = EndpointJudge(server.url, model, cache=cache, **changes)
        compare_models(judge, PROMPTS, ANSWERS, "SFT")
        assert (judge.usage.requests, judge.usage.cached) == (4, 0)


def test_transient_failures_are_tried_again_after_the_wait_that_is_asked_for(server):
    server.reply = prefers("bright")
    server.failures = [(503, {}), (429, {"Retry-After": "7"}), (500, {})]
    judge = EndpointJudge(server.url, "j", workers=1)
    assert compare_models(judge, PROMPTS, ANSWERS, "SFT")["PPO"].outcomes == [1.0, 1.0]
    assert judge.usage.retries == 3
    assert 0.25 <= server.slept[0] <= 1.0
    assert server.slept[1] == 7.0
    assert 1.0 <= server.slept[2] <= 4.0  # twice as long for each failure before


def test_gateways_and_garbage_are_tried_again(server):
    """520 is a proxy's, 501 a server's that is starting; a reply cut in the middle is not JSON, 0xff is not text."""
    server.reply = prefers("bright")
    server.failures = [(520, {}), (501, {}), (200, {}, b'{"choices": ['), (200, {}, b'{"a": "\xff"}')]
    judge = EndpointJudge(server.url, "j", workers=1)
    assert compare_models(judge, PROMPTS, ANSWERS, "SFT")["PPO"].outcomes == [1.0, 1.0]
    assert judge.usage.retries == 4


def test_a_limit_that_lasts_longer_than_two_minutes_stops_the_run(server):
    server.failures = [(429, {"Retry-After": "3600"}, b"quota used up")] * 9
    with pytest.raises(RuntimeError, match="HTTP 429: quota used up. Send fewer requests.*run this again"):
        compare_models(EndpointJudge(server.url, "j", workers=1), PROMPTS, ANSWERS, "SFT")
    assert server.slept == []


def test_giving_up_keeps_what_came(server, tmp_path):
    server.reply = prefers("bright")
    judge = EndpointJudge(server.url, "j", workers=1, attempts=2, cache=tmp_path / "c")
    compare_models(judge, PROMPTS[:1], {name: texts[:1] for name, texts in ANSWERS.items()}, "SFT")
    server.failures = [(503, {})] * 2
    with pytest.raises(RuntimeError, match="no answer to 2 requests.*HTTP 503"):
        compare_models(judge, PROMPTS, ANSWERS, "SFT")
    assert len(ReplyCache(tmp_path / "c").replies) >= 2


def test_nothing_of_the_environment_is_sent(server, monkeypatch):
    """The openai client reads all of these, and urllib's and httpx's proxies would see the requests."""
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "leaked")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer leaked\nX-Gateway: leaked")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    server.reply = lambda text: "Verdict: A"
    for key, sent in ((None, None), ("mine", "Bearer mine")):
        server.headers.clear()
        EndpointJudge(server.url, "j", api_key=key, attempts=1).compare(PAIRS)
        assert len(server.headers) == 2
        for headers in server.headers:
            assert headers.get("Authorization") == sent
            assert "leaked" not in str(headers)


def test_a_redirect_takes_the_key_nowhere(server):
    other = Server()
    server.failures = [(307, {"Location": f"{other.url}/chat/completions"})]
    with pytest.raises(RuntimeError, match="HTTP 307.*redirects are not followed"):
        EndpointJudge(server.url, "j", api_key="sk-0123456789", workers=1).compare(PAIRS)
    other.close()
    assert other.headers == []


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'instruct-trl\[judge\]'"):
        EndpointJudge("http://localhost:1/v1", "j")


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "HTTP 401: .*no such thing.* Set the API key"),
        (404, "usually ends in /v1"),
    ],
)
def test_a_refusal_is_not_tried_again(server, status, message):
    server.failures = [(status, {})] * 9
    with pytest.raises(RuntimeError, match=message):
        compare_models(EndpointJudge(server.url, "j", workers=1), PROMPTS, ANSWERS, "SFT")
    assert server.slept == []


def test_no_server_and_not_a_chat_server(server):
    server.raw = {"status": "ok"}
    with pytest.raises(RuntimeError, match="not as the chat API does"):
        compare_models(EndpointJudge(server.url, "j"), PROMPTS, ANSWERS, "SFT")
    with pytest.raises(RuntimeError, match="no answer to 2 requests.*ConnectError"):
        compare_models(EndpointJudge("http://127.0.0.1:9/v1", "j", attempts=2), PROMPTS, ANSWERS, "SFT")
    with pytest.raises(ValueError, match="give a URL such as"):
        EndpointJudge("localhost:8000", "j")


def test_what_is_no_chat_api_is_named_and_said_what_would_be(server):
    def message(**kwargs):
        with pytest.raises(
            RuntimeError, match=f"{server.url}.*choices.0..message.content.*usually ends in /v1"
        ) as error:
            compare_models(EndpointJudge(server.url, "j", workers=1, attempts=2, **kwargs), PROMPTS, ANSWERS, "SFT")
        return str(error.value)

    server.failures = [(200, {}, b"\n<!doctype html><p>Log in")] * 9
    assert "a web page" in message()
    assert server.slept == []  # another try would show the same page
    server.failures = [(200, {}, b"ok")] * 2
    assert "not valid JSON ('ok')" in message()
    server.failures = []
    for raw in (
        {"error": "busy"},
        {"choices": []},
        ["x"],
        {"choices": [{"message": {"content": [1]}}]},
        {"choices": 3},
    ):
        server.raw = raw
        assert "not as the chat API does" in message()
    server.raw = {"choices": [{"message": {"content": "Verdict: A"}}], "usage": "none"}
    assert compare_models(EndpointJudge(server.url, "j"), PROMPTS, ANSWERS, "SFT")["PPO"].outcomes == [0.5, 0.5]


def test_a_key_that_the_server_sends_back_is_kept_out_of_errors_and_cache(server, tmp_path):
    key = "sk-0123456789"
    judge = EndpointJudge(server.url, "j", api_key=key, cache=tmp_path / "replies.jsonl", workers=1)
    server.reply = lambda text: f"Your key is {key}.\nVerdict: A"
    assert compare_models(judge, PROMPTS[:1], {n: a[:1] for n, a in ANSWERS.items()}, "SFT")["PPO"].outcomes == [0.5]
    assert key not in (tmp_path / "replies.jsonl").read_text()
    for failure in (
        (401, {}, b"z" * 495 + key.encode()),
        (200, {}, f"<p>{key}".encode()),
        (200, {}, f'["{key}"]'.encode()),
    ):
        server.failures = [failure]
        with pytest.raises(RuntimeError) as error:
            judge.compare(PAIRS)
        assert key[:5] not in str(error.value)


@pytest.mark.parametrize(
    ("content", "finish"),
    [
        ("<think>Perhaps Verdict: A. But wait, B", "stop"),
        ("<think>No.</think>\n<think>Perhaps\nVerdict: A", "stop"),
        ("[THINK]Verdict: A", None),
        ("Verdict: A? On reflection, answer", "length"),
        (None, "length"),
    ],
)
def test_a_reply_that_was_cut_is_no_verdict_and_that_is_said(server, tmp_path, capsys, content, finish):
    server.raw = {"choices": [{"message": {"content": content}, "finish_reason": finish}]}
    for _ in range(2):  # asked, and from the cache
        judge = EndpointJudge(server.url, "j", both_orders=False, max_tokens=9, cache=tmp_path / "replies.jsonl")
        assert [(reply.value, reply.said) for reply in judge.compare(PAIRS)] == [(None, wording.CUT)]
        assert "1 replies were cut at max_tokens=9" in capsys.readouterr().out
        (rated,) = judge.rate([PAIRS[0].answer], find_questions(["likert"]))
        assert (rated["quality"].value, rated["quality"].said) == (None, wording.CUT)
        assert judge.cut == 2
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "content",
    [
        "<think>Verdict: A</think>Verdict: B",
        "Verdict: A, I thought.\n</think>\n\nVerdict: B",
        "[THINK]Verdict: A[/THINK]\nVerdict: B",
        "Answer A shows its <think> mark.\nVerdict: B",
    ],
)
def test_thoughts_that_are_closed_are_not_the_verdict(server, content):
    server.raw = {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}
    (reply,) = EndpointJudge(server.url, "j").compare(PAIRS)
    assert (reply.value, reply.flipped) == (0.5, True)  # B, whichever answer it is


def test_all_questions_in_one_request_an_answer(server):
    server.reply = lambda text: "quality: 6\nhallucination: " + ("yes" if "dull 1" in text else "no")
    questions = find_questions(["likert", "hallucination"])
    ratings = rate_models(EndpointJudge(server.url, "j"), PROMPTS, {"SFT": ANSWERS["SFT"]}, questions)
    assert [(r.question, r.mean, r.n) for r in ratings] == [("quality", 6.0, 2), ("hallucination", 0.5, 2)]
    assert len(server.requests) == 2


def test_replies_without_a_token_count_are_said(server):
    server.raw = {"choices": [{"message": {"content": "Verdict: tie"}}]}
    judge = EndpointJudge(server.url, "j", price_in=1.0)
    compare_models(judge, PROMPTS, ANSWERS, "SFT")
    assert judge.usage.uncounted == 4
    assert "4 replies without a token count" in judge.usage.line()
