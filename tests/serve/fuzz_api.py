"""schemathesis against a server of ours, in a process of its own: ``python fuzz_api.py nim|openai``.

All checks. Two rules cannot be written in JSON schema, so what keeps to the schema may still be refused by name: roles
alternate, and some fields exclude or need others. The last line of output is a JSON object {path: {status: count}}.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from live_server import live
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import ScriptedEngine, delta, finished

from headrace.engine.serve.profiles import PROFILES

KEY = "sesame"
AUTHORIZATION = {"authorization": f"Bearer {KEY}"}
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["200", "400", "404", "422"]
"""


class Obliging(ScriptedEngine):
    """Answers any number of choices, with log-probabilities where they are asked for."""

    def _start(self, prompt: Any, params: Any, options: Any) -> Any:
        events = []
        for i in range(params.n):
            if options is not None:
                events.append(delta("reasoning", "Hm", index=i, logprobs=params.logprobs))
            events += [delta("content", "It is 4.", index=i, logprobs=params.logprobs), finished(index=i)]
        self.play(events)
        return super()._start(prompt, params, options)


def main(profile: str) -> int:
    """Run schemathesis; returns its exit status."""
    with live(Obliging(), keys=[KEY], profile=PROFILES[profile]) as server, tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "schemathesis.toml")
        config.write_text(CONFIG)
        command = [
            *(str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(config)),
            *("run", f"{server.url}/openapi.json", "--checks", "all", "--max-examples", "10", "--no-color"),
            *("--request-timeout", "60", "--generation-deterministic", "--header", f"Authorization: Bearer {KEY}"),
        ]
        status = subprocess.run(command, check=False, cwd=folder, stderr=subprocess.STDOUT).returncode
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for family in text_string_to_metric_families(server.client.get("/metrics", headers=AUTHORIZATION).text):
            for sample in family.samples:
                if sample.name == "headrace:http_requests_total":
                    counts[sample.labels["path"]][sample.labels["status"]] += int(sample.value)
    print(json.dumps(counts), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
