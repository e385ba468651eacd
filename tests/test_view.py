"""What a user can rely on in the page of a run: whatever a model has written is shown and nothing more, in a real browser."""

import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT
from evaluate import report, view
from test_report import WEIGHS, episode, step
from test_stages import CANDIDATE, critique, rollout

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\"><!--<script>&amp;"
TASK = "scienceworld/find-animal/0"
in_browser = pytest.mark.skipif(not BROWSER, reason="needs chromium")


def save(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder, tasks=4, models=("base", "iter0", "iter1", "iter2"), turns=4, text=HOSTILE, observe=None):
    """Episodes of all models on test tasks, and one flagged step of a training task, all with a text in every place."""
    observe = observe or (lambda: text)
    for place, model in enumerate(models):
        for split, shift in (("seen", 0), ("unseen", tasks)):
            save(folder / model / f"eval-{split}.jsonl", *(episode(
                f"lifespan/{n + shift}", (n + place) % 3 / 2, [step(f"go {text}", WEIGHS if t else text, observation=observe()) for t in range(turns)],
                "success" if (n + place) % 3 == 2 else "turn limit", split) for n in range(tasks)))
    expert = {"key": TASK, "task": TASK, "instruction": text, "reward": 1.0, "source": "test",
              "steps": [step(f"look {text}", text), step("go", "I go.")]}
    save(folder / "expert.jsonl", expert)
    save(folder / "iter1" / "candidates.jsonl", CANDIDATE)
    places = range(len(CANDIDATE["candidates"]))
    save(folder / "iter1" / "rollouts.jsonl", *(rollout(place, f"look {text}") for place in places))
    save(folder / "iter1" / "critiques.jsonl", *(critique(place) | {"text": text, "used_template": True} for place in places))
    deliberates = step("go", WEIGHS) | {"original_thought": text, "draft_errors": ["no final action"]}
    save(folder / "iter1" / "deliberations.jsonl", expert | {"steps": [deliberates, expert["steps"][1]]})
    report(folder)
    view(folder)
    return folder / "index.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "hostile")


def shown(page, address="", size="1200,800"):
    """(the page's elements once it is ready, what its console said)"""
    done = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size}", "--virtual-time-budget=10000",
                           "--enable-logging=stderr", "--dump-dom", f"file://{page}#{address}"], text=True, capture_output=True, timeout=120)
    body = re.sub(r"<script.*?</script>", "", done.stdout.partition("<body")[2], flags=re.DOTALL)
    return body, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def tasks_listed(body):
    return re.findall(r'<li><a href="[^"]*"[^>]*><span>([^<]*)</span>', body)


def test_an_unchanged_run_has_the_same_bytes_and_no_text_of_a_model_ends_a_script(page):
    before = page.read_bytes()
    view(page.parent)
    assert page.read_bytes() == before
    own = (ROOT / "view.html").read_bytes()
    assert before.count(b"</script>") == own.count(b"</script>") + 9 + 1  # the tasks' and the run's
    assert before.count(b"<script") == own.count(b"<script") + 9 + 1 and HOSTILE.encode() not in before


@in_browser
@pytest.mark.parametrize("address", ["", f"task={TASK}&step=1", "task=scienceworld/lifespan/1", "search=onerror"])
def test_what_models_write_is_shown_as_it_is_and_runs_nothing(page, address):
    body, console = shown(page, address)
    assert 'data-ready="yes"' in body and not console
    assert "<img src=\"x\"" not in body and "broken" not in body.partition("<main>")[0]
    if "task=" in address:
        assert "&lt;/script&gt;&lt;script&gt;document.title='broken'" in body
    if "step=1" in address:
        assert "from the template" in body and "No deliberation of use: no final action" in body and 'class="step chosen"' in body
        assert body.count("<summary><span class=\"action\">") == len(CANDIDATE["candidates"])


@in_browser
@pytest.mark.parametrize("address, listed", [
    ("", 9),
    ("filter=training tasks", 1),
    ("filter=test tasks&model=SAND-1", 8),
    ("filter=better than SFT&model=SAND-1", 6),  # rewards 0, 1/2, 1 in turn, one place further each model
    ("filter=worse than SFT&model=SAND-1", 2),
    ("filter=ended: success&model=SAND-1", 4),
    ("filter=deliberated and failed&model=SAND-1", 4),
    ("filter=critiques from the template", 1),
    ("filter=deliberations without a draft of use", 1),
    ("filter=loops&model=SAND-1", 8),
    ("filter=refused actions&model=SAND-1", 0),
    ("search=find-animal", 1),
])
def test_a_question_is_answered_by_its_link(page, address, listed):
    body, console = shown(page, address.replace(" ", "%20"))
    names = tasks_listed(body)
    assert len(names) == listed and f"{listed} of 9 tasks" in body and not console
    if "than SFT" in address:  # the largest difference first
        signs = [float(found) for found in re.findall(r"\(([+-][\d.]+)\)", body.partition("<article")[0])]
        assert signs == sorted(signs, key=abs, reverse=True) and len({value > 0 for value in signs}) == 1


@in_browser
def test_alone_it_says_which_command_fills_it():
    body, console = shown(ROOT / "view.html")
    assert "make view RUN=name" in body and not console


@in_browser
@pytest.mark.slow
def test_three_hundred_tasks_with_eight_models_stay_small_and_open(tmp_path):
    draw, words = random.Random(0), Path(ROOT / "README.md").read_text().split()
    models = ("base", "iter0", "iter1", "iter2", "iter3", "more-sft/iter1", "no-sas/iter1", "no-eac/iter1")
    page = make_run(tmp_path / "large", 150, models, 25, "north", lambda: " ".join(draw.choices(words, k=80)))
    assert page.stat().st_size < 30e6
    body, console = shown(page, "task=scienceworld/lifespan/120", "500,900")
    assert "301 of 301 tasks" in body and body.count("<h3>") == 8 and not console
