"""llama.cpp's own converter, for a home-made tokenizer: ``python -m benchmarks.peers.to_gguf SOURCES ARGUMENTS``.

The converter knows pre-tokenizers by the hash of what they make of a sample and refuses others. Prompts here are ids,
so any will do.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    sources = Path(sys.argv[1])
    sys.path[:0] = [str(sources), str(sources / "gguf-py")]
    from conversion.base import TextModel  # type: ignore

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    script = sources / "convert_hf_to_gguf.py"
    sys.argv = [str(script), *sys.argv[2:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
