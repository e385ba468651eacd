"""The stages are scripts at the top of the project: let tests import them, and run them as a user does."""

import http.server
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"  # `make test` sets it up
if "--long" in sys.argv:
    os.environ["SAND_LONG"] = "1"  # the processes that share the tests have arguments of their own
LONG = "SAND_LONG" in os.environ
sys.path.insert(0, str(ROOT))
from prompts.engine import PROBE  # noqa: E402

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on a busy machine, two threads wait for each other more than they compute

MOVES = {"scienceworld": ["look around", "teleport to kitchen", "open cupboard", "focus on agent",
                          "teleport to outside", "wait1", "pick up thermometer", "fly away", ""],
         "alfworld": ["look", "go to drawer 1", "open drawer 1", "go to sidetable 1", "inventory", "fly away", ""]}


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="leave out the tests that load a model or run for minutes")
    parser.addoption("--long", action="store_true",
                     help="run everything: 20 kills a stage, 2,000 episodes an environment; `make test-long`")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: loads a model, runs the Makefile or runs for minutes; "
                            "`make test PYTEST=--quick` leaves it out")
    config.addinivalue_line("markers", "long: runs for many minutes; only with --long, as `make test-long` does")


# Each of their tests is a job of its own for the processes that share the tests; other files, whose tests share what is slow to
# make, are one job, and those that need the engine are one together.
APART = ("test_environments.py", "test_faults.py", "test_paper_path.py", "test_servers.py", "test_soak.py", "test_stages.py")
ENGINE = ("test_engine.py", "test_scheduler.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Jobs(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = Path(nodeid.partition("::")[0]).name
            return nodeid if file in APART else "engine" if file in ENGINE else file

    return Jobs(config, log)


def pytest_collection_modifyitems(config, items):
    left_out = {"slow": "--quick"} if config.getoption("--quick") else {}
    if not LONG:
        left_out["long"] = "only with --long"
    for item in items:
        for marker, reason in left_out.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def script(tmp_path):
    """script("stage1_sample.py", "--help") runs a stage in an empty folder; environment variables by keyword."""
    def run(name, *arguments, **environment):
        return subprocess.run([sys.executable, ROOT / name, *map(str, arguments)], cwd=tmp_path, text=True,
                              capture_output=True, env=os.environ | environment, timeout=600)
    return run


def marked(mark):
    """The processes whose environment says SAND_TEST=mark, whoever has become their parent; this one aside."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("SAND_TEST") == mark:
                if "resource_tracker" not in " ".join(process.cmdline()):  # Python's own
                    found.append(process)
        except psutil.Error:
            pass
    return found


def wait_until_gone(mark):
    """Wait for them to end, a minute at most; -> those that have not."""
    deadline = time.monotonic() + 60
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


@pytest.fixture(scope="session")
def engine():
    """The packaged model in a real vLLM in this process."""
    from prompts.engine import LocalEngine
    return LocalEngine(str(MODEL), 2048, 0, {"max_num_seqs": 64})


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The packaged model's tokenizer and architecture with weights small enough to train in a second."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
    folder = tmp_path_factory.mktemp("tiny")
    config = AutoConfig.from_pretrained(MODEL, num_hidden_layers=2, hidden_size=36, intermediate_size=64,
                                        num_attention_heads=3, num_key_value_heads=3, head_dim=12)
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


class Server(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server of the model "m"; subclasses say how a request for completions is answered."""

    def do_GET(self):
        self.send(200, {"object": "list", "data": [{"id": "m", "object": "model"}]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if request["messages"][-1]["content"] == PROBE:
            self.complete(*["Hello"] * request["n"])
        else:
            self.answer(request)

    def complete(self, *texts, **changes):
        choices = [{"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
                   for i, text in enumerate(texts)]
        usage = {"prompt_tokens": 7, "completion_tokens": 3 * len(texts), "total_tokens": 10}
        self.send(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices,
                        "usage": usage} | changes)

    def send(self, status, body):
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


class ScriptedServer(Server):
    """A model that answers by the prompt and the request's seed alone, after a moment that differs."""

    def answer(self, request):
        draw = random.Random(json.dumps([request["messages"], request["seed"]]))
        time.sleep(random.uniform(0, 0.05))
        self.complete(*(self.write(request["messages"][-1]["content"], draw) for _ in range(request.get("n", 1))))

    @staticmethod
    def write(prompt, draw):
        if "Action Evaluation" in prompt:
            return draw.choice(["I cannot say.", (
                "Action Evaluation: Looking around at the thermometer in the kitchen or outside tells the agent "
                "little. The cupboard is no better. It should find the animal.")])
        move = draw.choice(MOVES["scienceworld"])
        return f"Thought: {draw.randrange(9)}.\nAction: {move}" if move else "Hm."


def serve(handler):
    """-> (the server, its address for --api-base)"""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/v1"


@pytest.fixture(scope="module")
def scripted():
    """The address of a ScriptedServer."""
    server, address = serve(ScriptedServer)
    yield address
    server.shutdown()
