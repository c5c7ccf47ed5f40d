"""The whole chain on the embedded digits, each step a command anyone can type: train, attack, report, export, serve, ask.

python -m commands.demo
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

RUN, EXPORTED = "runs/digits", "exported/digits"


def main() -> None:
    start = time.perf_counter()
    _step("trainers.train", "--dataset=digits", f"--run_dir={RUN}")
    _step("trainers.evaluate", f"--run_dir={RUN}")
    taken = [int(path.name) for path in Path(EXPORTED).glob("*") if path.name.isdecimal()]
    version = max(taken, default=0) + 1  # a version is never overwritten, and the server takes the highest
    _step("serving.export", f"--run_dir={RUN}", f"--export_dir={EXPORTED}", f"--version={version}")
    _serve_and_ask(sorted(Path(RUN, "plots", "examples").glob("*.png"))[:4])
    seconds = time.perf_counter() - start
    print(f"\nThe demo took {seconds:.0f} s. Open {RUN}/report.html.")


def _step(module: str, *arguments: str) -> None:
    _show(module, *arguments)
    done = subprocess.run([sys.executable, "-m", module, *arguments])
    if done.returncode:
        sys.exit(done.returncode)


def _serve_and_ask(images: list[Path]) -> None:
    """Starts the server, sends it clean and adversarial images with and without the purifier, stops it."""
    serve = ["--model_base_path=" + EXPORTED, "--model_name=digits", "--port=0"]
    _show("serving.server", *serve)
    with subprocess.Popen(
        [sys.executable, "-m", "serving.server", *serve], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            line = server.stdout.readline() if server.stdout else ""
            print(line, end="")
            address = line.strip().rpartition(" at ")[2]
            if not address:
                sys.exit(server.wait() or 1)
            files = [f"--image={image}" for image in images]
            for signature in ("undefended", "serving_default"):
                asked = (f"--server={address}", "--model_name=digits", f"--signature={signature}", *files)
                _step("serving.client", *asked)
        finally:
            server.terminate()


def _show(module: str, *arguments: str) -> None:
    print(f"\n$ python -m {module} {' '.join(arguments)}", flush=True)


if __name__ == "__main__":
    main()
