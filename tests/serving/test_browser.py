"""The page in headless Chromium, on the real application over tiny random policies."""

import json
import shlex
import time
from dataclasses import dataclass

import pandas as pd
import pytest

from emorl.cli import main
from emorl.config.experiment import BaseConfig, DataConfig, Experiment, ObjectiveConfig
from emorl.runs.layout import ENSEMBLE, Layout
from emorl.runs.results import Point, SearchResult, write_result
from emorl.stages.materials import Materials
from emorl.stages.serve import Serving, make_server
from emorl.stages.stage import keep_experiment

pytest.importorskip("playwright", reason="the package playwright drives the browser")
from recipes.serve.screenshot import CHROMIUM, chromium, running, screenshot

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")]

HOSTILE = '<img src=x onerror="window.hacked = 1"> <script>window.hacked = 1</script> \'it\'s\' \\ $HOME `id` "q" 😀\n--prompt'
FRONT = [
    Point({"brief": 0.0, "varied": 1.0}, {"brief": 0.2, "varied": 0.9}, 0.55),
    Point({"brief": 0.3125, "varied": 0.6875}, {"brief": 0.5, "varied": 0.8}, 0.65),
    Point({"brief": 1.0, "varied": 0.0}, {"brief": 0.9, "varied": 0.3}, 0.6),
]  # emorl/front/3, 1 and 2
NAMES = ("brief", "varied", "fresh", "short")


def one_policy_alone(place, own):
    scores = {name: 0.8 if name == own else 0.1 * place for name in NAMES}
    return Point({name: float(name == own) for name in NAMES}, scores, 0.5 + place)


FRONT_OF_FOUR = [one_policy_alone(place, own) for place, own in enumerate(NAMES)]


@pytest.fixture(scope="module")
def write_served_run(tmp_path_factory, tiny_base_dir, make_causal_model, write_adapter):
    """Factory: a run whose search has found the front."""

    def write(front, best):
        root = tmp_path_factory.mktemp("served")
        functions = {name: "distinct_2" if name == "varied" else "length" for name in front[0].weights}
        prompts = ("say yes", "say no", HOSTILE, "say so", "say it")
        (root / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
        experiment = Experiment(
            output=root / "run",
            base=BaseConfig(model=str(tiny_base_dir)),
            data=DataConfig(path=str(root / "prompts.jsonl"), validation=2, test=2),
            objectives={name: ObjectiveConfig(function=function) for name, function in functions.items()},
            generation={"max_new_tokens": 24, "do_sample": False},
        )
        layout = Layout(experiment.output)
        for seed, name in enumerate(functions):
            write_adapter(make_causal_model("llama"), layout.policy(name), seed=seed)
        keep_experiment(experiment)
        layout.search.mkdir()
        Materials(experiment).mixture().save_pretrained(layout.search / ENSEMBLE)
        layout.evaluation.mkdir()
        scores = dict.fromkeys(functions, [0.0] * 4 + [0.52] * 2 + [1.0] * 4)
        answered = {"prompt_index": range(10), "prompt": [*prompts, *prompts], "system": "base", **scores}
        pd.DataFrame(answered).to_parquet(layout.evaluation / "completions.parquet")
        write_result(layout.search, SearchResult("hierarchical_grid", "mean", {}, len(front), None, best=best, front=front))
        return experiment.output

    return write


@pytest.fixture(scope="module")
def run(write_served_run):
    return write_served_run(FRONT, FRONT[1])


@pytest.fixture(scope="module")
def address(run):
    with running(make_server(run, Serving(port=0))) as where:
        yield where


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@dataclass
class Visit:
    """A page with what it was asked, and the errors of its scripts."""

    page: object
    asked: list

    def answer(self, letter):
        return self.page.locator(f"[data-side={letter}]")

    def text(self, letter):
        """The whole answer of one side."""
        self.answer(letter).locator(".state", has_text="Done").wait_for()
        return self.answer(letter).locator(".text").inner_text()

    def ask(self, prompt):
        self.page.locator("#prompt").fill(prompt)
        self.page.get_by_role("button", name="Answer", exact=True).click()
        return self.text("A"), self.text("B")

    def shares(self):
        return [int(output.inner_text().removesuffix(" %")) for output in self.page.locator("#sliders output").all()]

    def wait_for_request(self, number):
        until(lambda: len(self.asked) >= number, self.page)


def until(holds, page):
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        page.wait_for_timeout(20)


@pytest.fixture
def visit(browser):
    """Opens a page; no script of it may fail."""
    errors, contexts = [], []

    def open_page(where, width=1000, **options):
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        page, asked = context.new_page(), []
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: asked.append(request.post_data_json) if "completions" in request.url else None)
        page.goto(where)
        page.locator("#send:enabled").or_(page.locator("dialog")).first.wait_for()
        return Visit(page, asked)

    yield open_page
    for context in contexts:
        context.close()
    assert not errors


def test_moving_a_slider_brings_another_text_from_the_policies_and_none_from_the_base(visit, address):
    seen = visit(address)
    mixed, base = seen.ask("say yes")
    assert mixed
    assert base
    assert mixed != base
    seen.page.locator("#share-0").fill("100")
    seen.wait_for_request(3)
    alone = seen.text("A")
    assert alone != mixed
    assert [body["model"] for body in seen.asked] == ["emorl", "emorl/base", "emorl"]
    assert seen.asked[2]["weights"] == {"brief": 1, "varied": 0}
    assert seen.answer("B").locator(".text").inner_text() == base
    seen.answer("B").get_by_label("Answered by").select_option("emorl/policy/brief")
    seen.wait_for_request(4)
    assert seen.text("B") == alone  # one policy with all the weight is that policy


def test_both_answers_are_asked_for_before_either_has_come_and_grow_as_they_are_written(visit, address):
    seen, held = visit(address), []
    seen.page.route("**/v1/chat/completions", lambda route: held.append(route))
    seen.page.get_by_text("Settings").click()
    seen.page.get_by_label("Longest answer").fill("400")  # takes its time
    seen.page.evaluate(
        """() => document.querySelectorAll(".text").forEach((text) => {
            text.lengths = new Set();
            const note = () => text.lengths.add(text.textContent.length);
            new MutationObserver(note).observe(text, { childList: true, characterData: true });
        })"""
    )
    seen.page.locator("#prompt").fill("say yes")
    seen.page.locator("#send").click()
    until(lambda: len(held) == 2, seen.page)
    assert seen.answer("A").locator(".state").inner_text() == "Writing …"
    for route in held:
        route.continue_()
    assert seen.text("A") != seen.text("B")
    grown = seen.page.evaluate("[...document.querySelectorAll('.text')].map((text) => text.lengths.size)")
    assert min(grown) > 2


def test_wrong_input_is_answered_in_one_sentence_in_its_place(visit, address):
    seen = visit(address)
    seen.page.locator("#prompt").fill("  \n ")
    seen.page.locator("#send").click()
    assert seen.page.locator("#wrong").inner_text() == "Write a message first, or take a test prompt."
    assert seen.asked == []
    seen.page.locator("#prompt").fill("say yes")
    seen.page.get_by_text("Settings").click()
    seen.page.get_by_label("Longest answer").fill("100000")
    seen.page.locator("#send").click()
    error = seen.answer("A").get_by_role("alert")
    error.wait_for()
    assert "ask for fewer tokens" in error.inner_text()
    assert seen.page.locator("#wrong").is_hidden()
    seen.page.get_by_label("Longest answer").fill("8")
    seen.page.route("**/v1/chat/completions", lambda route: route.abort())
    seen.page.locator("#send").click()
    error.get_by_text("The server cannot be reached").wait_for()
    seen.page.unroute("**/v1/chat/completions")
    assert all(seen.ask("say yes"))
    assert error.is_hidden()


def test_settings_that_are_none_are_named_also_where_they_are_folded_away(visit, address):
    seen = visit(address)
    for field, value in (("#tokens", "0"), ("#tokens", "1.5"), ("#temperature", "3"), ("#tokens", "")):
        kept = seen.page.locator(field).input_value()
        seen.page.locator(field).evaluate("(field, value) => (field.value = value)", value)
        seen.page.locator("#send").click()
        assert seen.page.locator("#wrong").inner_text().startswith("Settings: ")
        seen.page.locator(field).evaluate("(field, value) => (field.value = value)", kept)
    assert seen.asked == []


def test_scores_that_come_late_are_not_shown_beside_another_answer(visit, address):
    seen, held = visit(address), []
    seen.answer("B").get_by_label("Answered by").select_option("emorl/policy/brief")
    seen.page.route("**/v1/emorl/scores", lambda route: held.append(route) if len(held) < 2 else route.continue_())
    seen.ask("say yes")
    until(lambda: len(held) == 2, seen.page)
    seen.ask("say no")
    first = seen.answer("A").locator(".score b").first
    shown = first.inner_text()
    for route in held:
        route.fulfill(json={"scores": [{"brief": 77.0}], "problems": {}})
    seen.page.wait_for_timeout(200)
    assert first.inner_text() == shown != "77.00"


def test_stop_ends_answers_that_are_being_written(visit, address):
    seen, held = visit(address), []
    seen.page.route("**/v1/chat/completions", lambda route: held.append(route))
    assert seen.page.locator("#stop").is_disabled()
    seen.page.locator("#send").click()
    until(lambda: len(held) == 2, seen.page)
    seen.page.locator("#stop").click()
    for letter in "AB":
        seen.answer(letter).get_by_text("Stopped.").wait_for()
    assert seen.page.locator("#stop").is_disabled()


def test_a_hostile_answer_and_hostile_prompts_stay_text(visit, address):
    seen = visit(address)
    chunk = {"choices": [{"index": 0, "delta": {"content": HOSTILE}}], "emorl": {"kind": "front", "weights": {HOSTILE: 1.0}}}
    stream = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    seen.page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=stream))
    options = seen.page.locator("#examples option").evaluate_all("(options) => options.map((option) => option.value)")
    assert HOSTILE in options
    text, _ = seen.ask(HOSTILE)
    assert text == HOSTILE
    seen.page.wait_for_timeout(200)
    assert seen.page.locator("main img, main script").count() == 0
    assert seen.page.evaluate("window.hacked") is None


def test_the_policy_of_contents_blocks_code_that_gets_into_the_page(visit, address):
    seen = visit(address)
    blocked = seen.page.evaluate(
        """async () => {
        const blocked = [];
        document.addEventListener("securitypolicyviolation", (event) => blocked.push(event.effectiveDirective));
        const script = document.createElement("script");
        script.textContent = "window.hacked = 1";
        document.body.append(script);
        document.body.insertAdjacentHTML("beforeend", "<img src='x' onerror='window.hacked = 1'><p style='color: red'>");
        await fetch("https://example.org/").catch(() => 0);
        await new Promise((resolve) => setTimeout(resolve, 300));
        return blocked;
        }"""
    )
    assert {"script-src-elem", "script-src-attr", "style-src-attr", "connect-src"} <= set(blocked)
    assert seen.page.evaluate("window.hacked") is None


def test_the_keyboard_moves_sliders_which_always_share_out_the_whole(visit, address):
    seen = visit(address)
    assert seen.shares() == [31, 69]  # the best found
    seen.page.locator("#share-0").focus()
    for _ in range(4):
        seen.page.keyboard.press("ArrowRight")
    assert seen.shares() == [35, 65]
    assert seen.page.locator("#share-1").get_attribute("aria-valuetext") == "65 percent"
    seen.page.keyboard.press("End")
    assert seen.shares() == [100, 0]
    seen.page.keyboard.press("Home")
    assert seen.shares() == [0, 100]
    seen.wait_for_request(1)
    assert seen.asked[-1]["weights"] == {"brief": 0, "varied": 1}
    seen.page.get_by_role("button", name="All equal").click()
    assert seen.shares() == [50, 50]
    seen.page.locator("#prompt").fill("")
    seen.page.locator("#prompt").press_sequentially("say yes")
    seen.page.keyboard.press("Control+Enter")
    seen.wait_for_request(3)
    assert seen.text("A")
    assert seen.asked[-1]["messages"] == [{"role": "user", "content": "say yes"}]


def test_a_click_on_a_point_or_enter_moves_the_sliders_to_its_very_weights(visit, address):
    seen = visit(address)
    points = seen.page.locator("#picture").get_by_role("option", name="mixture")
    assert points.count() == 3
    points.nth(1).click()
    assert seen.shares() == [100, 0]
    assert points.nth(1).get_attribute("aria-selected") == "true"
    assert "brief 0.90 · varied 0.30" in seen.page.locator("#point").inner_text()
    ring = "[...document.querySelectorAll('.here, [aria-selected=true] .dot')].map((mark) => mark.getAttribute('cx'))"
    assert len(set(seen.page.evaluate(ring))) == 1
    seen.page.keyboard.press("ArrowLeft")
    seen.page.keyboard.press("Enter")
    assert seen.shares() == [31, 69]
    assert seen.page.locator("#point").inner_text().startswith("Mixture 1, the best found")
    seen.wait_for_request(1)
    seen.text("A")
    assert seen.asked[-1]["weights"] == {"brief": 0.3125, "varied": 0.6875}
    seen.page.locator("#share-0").fill("90")
    assert seen.page.locator("[aria-selected=true]").count() == 0
    assert seen.page.locator("#point").inner_text().startswith("Here, about")


def test_scores_are_shown_where_the_answer_is(visit, address):
    seen = visit(address)
    seen.ask("say yes")
    rows = seen.answer("A").locator(".score")
    rows.nth(1).wait_for()
    assert [row.locator("span").first.inner_text() for row in rows.all()] == ["brief", "varied"]
    assert all(0 <= float(row.locator("b").inner_text()) <= 1 for row in rows.all())
    answer = {"scores": [{"brief": 1.0, "varied": 0.52}], "problems": {"fresh": "objective 'fresh' raised <b>RuntimeError</b>"}}
    seen.page.route("**/v1/emorl/scores", lambda route: route.fulfill(json=answer))
    seen.ask("say no")
    shown = seen.answer("A").locator(".scores").inner_text()
    assert "1.00, above 60 % of them" in shown  # 4 of the 10 answers to test prompts scored as high
    assert "0.52, above 40 % of them" in shown
    assert "objective 'fresh' raised <b>RuntimeError</b>" in shown


def test_the_command_the_json_and_the_python_line_bring_the_same_text(visit, address, capsys):
    seen = visit(address, permissions=["clipboard-read", "clipboard-write"])
    seen.page.locator("#share-0").fill("61")
    text, _ = seen.ask(HOSTILE)
    seen.answer("A").get_by_text("Reproduce this answer").click()
    command, curl, python = (block.inner_text() for block in seen.answer("A").locator("pre").all())
    seen.answer("A").get_by_role("button", name="Copy curl").click()
    seen.answer("A").get_by_text("Copied").wait_for()
    assert seen.page.evaluate("navigator.clipboard.readText()") == curl
    words = shlex.split(command)
    assert words[:2] == ["emorl", "generate"]
    assert f"--prompt={HOSTILE}" in words
    capsys.readouterr()
    assert main(words[1:]) == 0
    assert capsys.readouterr().out.strip() == text.strip()
    words = shlex.split(curl)
    body = json.loads(words[words.index("-d") + 1])
    [asked] = [body for body in seen.asked if body.get("model") == "emorl"][-1:]
    assert body | {"stream": True} == asked
    assert words[1] == f"{address}/v1/chat/completions"
    pytest.importorskip("openai")
    exec(compile(python, "the Python line", "exec"), {})
    assert capsys.readouterr().out.strip() == text.strip()


def test_a_server_with_a_key_asks_for_it_and_never_shows_it(visit, run):
    with running(make_server(run, Serving(port=0, key="sesame"))) as where:
        seen = visit(where)
        dialog = seen.page.get_by_role("dialog", name="This server asks for its key")
        for key in ("open", "sesame"):
            dialog.get_by_label("Key", exact=True).fill(key)
            seen.page.keyboard.press("Enter")
            seen.page.wait_for_timeout(300)
            assert dialog.get_by_text("That was not its key.").is_visible() == (key == "open")
        dialog.wait_for(state="hidden")
        assert all(seen.ask("say yes"))
        seen.answer("A").get_by_text("Reproduce this answer").click()
        _, curl, python = (block.inner_text() for block in seen.answer("A").locator("pre").all())
        assert '-H "Authorization: Bearer $EMORL_API_KEY"' in curl
        assert 'api_key=os.environ["EMORL_API_KEY"]' in python
        assert "sesame" not in seen.page.content()
        assert seen.page.evaluate("Object.values(localStorage).length") == 0


def test_one_policy_in_a_folder_has_a_page_without_a_choice(visit, run):
    with running(make_server(Layout(run).policy("brief"), Serving(port=0))) as where:
        seen = visit(where)
        assert seen.page.locator("#steer").is_hidden()
        assert seen.page.locator(".answer").count() == 1
        seen.page.locator("#prompt").fill("say yes")
        seen.page.locator("#send").click()
        assert seen.text("A")


def test_four_objectives_are_lines_with_limits_that_leave_points_out(visit, write_served_run):
    with running(make_server(write_served_run(FRONT_OF_FOUR, FRONT_OF_FOUR[3]), Serving(port=0))) as where:
        seen = visit(where, width=360)
        lines = seen.page.locator("#picture").get_by_role("option", name="mixture")
        assert lines.count() == 4
        assert seen.shares() == [0, 0, 0, 100]
        seen.page.get_by_label("brief not worse than").fill("60")
        assert seen.page.locator("#point").inner_text() == "1 of 4 mixtures are left."
        assert [line.get_attribute("aria-disabled") for line in lines.all()] == ["true", "true", "true", "false"]
        lines.nth(1).locator(".reach").dispatch_event("click")  # is left out: does nothing
        assert seen.shares() == [0, 0, 0, 100]
        seen.page.get_by_role("button", name="Best found").click()
        assert seen.shares() == [100, 0, 0, 0]
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_page_fits_a_phone_whatever_the_answer_and_is_light_or_dark(visit, address):
    colours = []
    for scheme in ("light", "dark"):
        seen = visit(address, width=360, color_scheme=scheme)
        colours.append(seen.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        seen.ask("endless" * 60)
        for letter in "AB":
            seen.answer(letter).get_by_text("Reproduce this answer").click()
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= 360
    assert colours == ["rgb(255, 255, 255)", "rgb(22, 25, 29)"]


def test_everything_that_can_be_used_has_a_name_and_is_reached_by_tab(visit, address):
    seen = visit(address)
    seen.ask("say yes")
    reached = set()
    seen.page.evaluate("document.activeElement.blur()")
    name = "document.activeElement.id || document.activeElement.getAttribute('class')"
    for _ in range(40):
        seen.page.keyboard.press("Tab")
        reached.add(seen.page.evaluate(name))
    assert {"share-0", "share-1", "best", "equal", "prompt", "send", "examples", "who", "point"} <= reached
    unnamed = seen.page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button")].filter((part) =>
        !part.labels?.length && !part.ariaLabel && !part.textContent.trim()).map((part) => part.outerHTML)"""
    )
    assert unnamed == []


def test_the_picture_of_the_page_is_small_enough_to_keep(browser, address, tmp_path):
    screenshot(browser, address, tmp_path / "page.png", width=360, dark=True)
    picture = (tmp_path / "page.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert int.from_bytes(picture[16:20]) == 360
    assert len(picture) < 200_000
