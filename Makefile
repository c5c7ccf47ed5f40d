# Every target makes the environment it needs: a fresh checkout and Python 3.10-3.13 are enough.
PYTHON ?= python3
VENV ?= .venv

.DEFAULT_GOAL := help
.PHONY: help demo results test lint clean

help:
	@echo "make demo    train, attack, report, export, serve and query on the embedded data set"
	@echo "make results fill the tables of RESULTS.md from the reports in results/"
	@echo "make test    run the tests"
	@echo "make lint    ruff and mypy"
	@echo "make clean   remove the environment and caches (runs/ and exported/ stay)"
	@echo "Settings: PYTHON=python3 (which Python makes the environment), VENV=.venv (where it lies)"

demo:
	@$(call install,requirements.txt)
	@"$(VENV)/bin/python" -m commands.demo

results:
	@$(call install,requirements.txt)
	@"$(VENV)/bin/python" -m commands.results

test:
	@$(call install,requirements.txt requirements-dev.txt)
	@"$(VENV)/bin/python" -m pytest -q -n 2 --dist loadfile

lint:
	@$(call install,requirements.txt requirements-dev.txt)
	@"$(VENV)/bin/python" -m ruff check .
	@"$(VENV)/bin/python" -m ruff format --check .
	@"$(VENV)/bin/python" -m mypy vqunet_tf commands trainers serving

clean:
	rm -rf "$(VENV)" build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Makes the environment if there is none, then installs each file that is newer than its stamp in there.
# Stamps are tested in the shell, not by make, so that paths may hold spaces. The pip that comes with Python 3.10
# takes many minutes to resolve what a newer one resolves in seconds; without a newer one it still works.
define install
set -e; \
if ! "$(VENV)/bin/python" -m pip --version >/dev/null 2>&1; then \
	"$(PYTHON)" -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info < (3, 14) else f"error: expected Python 3.10-3.13, got {sys.version.split()[0]}: give another with PYTHON=python3.11")'; \
	"$(PYTHON)" -m venv "$(VENV)"; \
	"$(VENV)/bin/python" -m pip install --quiet --upgrade pip || true; \
fi; \
for file in $(1); do \
	stamp="$(VENV)/.$$file"; \
	if [ ! -e "$$stamp" ] || [ "$$file" -nt "$$stamp" ]; then \
		echo "installing $$file into $(VENV) (minutes, the first time)"; \
		"$(VENV)/bin/python" -m pip install --quiet --disable-pip-version-check -r "$$file"; \
		touch "$$stamp"; \
	fi; \
done
endef
