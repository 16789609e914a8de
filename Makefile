# Needs python3 (3.10 or later) and a C++ compiler; everything else goes into .venv.
# Another interpreter: make setup PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.setup-done
SAMPLE := data/raw/sample.jsonl
TOKENIZER := data/text/tokenizer.model
SHARDS := data/text/manifest.json
HALVES := data/halves/manifest.json
VIDEOS := data/raw/video
VIDEO_SHARDS := data/video/manifest.json
SHAPES := data/raw/shapes
SHAPES_CLIPS := data/shapes/manifest.json
SHAPES_LATENTS := data/shapes_latents/manifest.json
SHAPES_PATCHES := data/shapes_patches/manifest.json
DIGITS := data/digits/manifest.json
# Of the task of pointers: documents of at most 1, 2, 3 and 4 hops, and harder ones, which are only evaluated. The trees
# of the first three are no deeper than that, so that most of their nodes can be asked for.
LESSONS := hops1 hops2 hops3 hops4 harder
WORDS := data/reasoning/tokenizer.model
# Which of the slow tests run beside the fast ones: the commit decides, so that every part gets its turn.
SLOW_PART = $(shell echo $$((0x$$(git rev-parse --short=6 HEAD 2>/dev/null || echo 0))))
# Share of whole books that neither the tokenizer nor the model sees in training.
HOLDOUT := 0.05

# What the environment installs comes first, also for the processes that launchers start.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# A package path meant for another interpreter would win over what is installed here.
unexport PYTHONPATH PYTHONHOME

# Train a configuration into its run folder. A run that was stopped leaves with 0 as well, but what follows needs its end.
define train
$(VENV)/bin/deepspeed --num_accelerators 1 launchers/train.py --config configs/$(1).yaml run_dir=$(2) $(3)
$(VENV)/bin/python launchers/watch.py $(2) --finished
endef

# Begin with the weights of the quickstart, of an EBT (no second argument) or of its twin (`ar_` and `_ar`), and learn
# prompts with completions: two epochs of 96 batches.
define fine_tune
$(call train,$(1)quickstart,runs/halves$(2),training.initialize_from=runs/quickstart$(2) data.path=data/halves \
	training.max_steps=192 validation.interval=96 checkpoint.interval=96 optimizer.lr=1.0e-3 optimizer.warmup_steps=20)
endef

# The same beside another run, which has the console: what this one prints goes into a file.
define train_beside
@mkdir -p $(dir $(2)) && echo "$(2) trains beside the others, its console is in $(2).log"
$(call train,$(1),$(2),> $(2).log 2>&1 || { tail $(2).log >&2; exit 1; })
endef

.PHONY: setup data data-reasoning data-video data-shapes data-patches data-digits train train-reasoning train-video \
	train-shapes train-patches train-denoise fine-tune test coverage check clean reasoning-ebt reasoning-ar4 reasoning-ar2 reasoning-ar1 \
	denoise-ebt denoise-dit patches-ebt patches-ar patches-dit

setup: $(STAMP)

# The .pth file and its module are copied by the installation (see pyproject.toml), so their changes reinstall.
$(STAMP): pyproject.toml constraints.txt ebwm_dist/torchvision_compat.py ebwm_dist_torchvision.pth
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is not Python 3.10 or later; name one: make setup PYTHON=python3.12" >&2; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,wandb]'
	touch $@

data: $(SHARDS)

data-reasoning: $(LESSONS:%=data/reasoning/%/manifest.json)

data-video: $(VIDEO_SHARDS)

data-shapes: $(SHAPES_LATENTS)

data-patches: $(SHAPES_PATCHES)

data-digits: $(DIGITS)

train: setup data
	$(call train,quickstart,runs/quickstart)
	$(call train,ar_quickstart,runs/quickstart_ar)
	$(VENV)/bin/python launchers/evaluate.py --summary --run runs/quickstart --baseline runs/quickstart_ar

# What the quickstart's models know of held-out completions, before and after they learn from prompts.
fine-tune: setup data $(HALVES)
	$(call train,quickstart,runs/quickstart)
	$(call train,ar_quickstart,runs/quickstart_ar)
	$(call fine_tune)
	$(call fine_tune,ar_,_ar)
	$(VENV)/bin/python launchers/evaluate.py --summary --run runs/quickstart --baseline runs/quickstart_ar \
		--data data/halves --out runs/halves/before
	$(VENV)/bin/python launchers/evaluate.py --summary --run runs/halves --baseline runs/halves_ar

# These models are small: two side by side, a thread each, are done much sooner than one after the other.
train-reasoning: setup data-reasoning
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j$$(getconf _NPROCESSORS_ONLN) \
		reasoning-ebt reasoning-ar4 reasoning-ar2 reasoning-ar1
	$(VENV)/bin/python launchers/evaluate.py --summary --run runs/reasoning --data data/reasoning/harder \
		--baseline runs/reasoning_ar1 --baseline runs/reasoning_ar2 --baseline runs/reasoning_ar4

reasoning-ebt:
	$(call train,reasoning,runs/reasoning)

reasoning-ar1:
	$(call train_beside,ar_reasoning,runs/reasoning_ar1)

reasoning-ar2 reasoning-ar4: reasoning-ar%:
	$(call train_beside,ar_reasoning_$*layers,runs/reasoning_ar$*)

train-video: setup data-video
	$(call train,ebwm_video_quickstart,runs/video_quickstart)
	$(call train,ar_video_quickstart,runs/video_quickstart_ar)
	$(VENV)/bin/python launchers/evaluate.py --summary --run runs/video_quickstart \
		--baseline runs/video_quickstart_ar

train-shapes: setup data-shapes
	$(call train,ebwm_video_shapes,runs/video_shapes)
	$(call train,ar_video_shapes,runs/video_shapes_ar)
	$(VENV)/bin/python launchers/evaluate.py --summary --run runs/video_shapes --baseline runs/video_shapes_ar

# As with reasoning: small models, a thread each, side by side.
train-patches: setup data-patches
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j$$(getconf _NPROCESSORS_ONLN) patches-ebt patches-ar patches-dit
	$(VENV)/bin/python launchers/evaluate.py --summary --run runs/video_patches --baseline runs/video_patches_ar \
		--baseline runs/video_patches_dit

patches-ebt:
	$(call train,ebwm_video_patches,runs/video_patches)

patches-ar patches-dit: patches-%:
	$(call train_beside,$*_video_patches,runs/video_patches_$*)

train-denoise: setup data-digits
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j$$(getconf _NPROCESSORS_ONLN) denoise-ebt denoise-dit
	$(VENV)/bin/python launchers/evaluate.py --summary --run runs/denoise --baseline runs/denoise_dit --batch-size 128

denoise-ebt:
	$(call train,denoise,runs/denoise)

denoise-dit:
	$(call train_beside,dit_denoise,runs/denoise_dit)

test: setup
	$(VENV)/bin/python -m pytest -n logical --maxprocesses 4 --dist worksteal --slow-part $(SLOW_PART)

# The fast tests again, with the lines that none of them runs: a sixth more time.
coverage: setup
	$(VENV)/bin/python -m pytest -n logical --maxprocesses 4 --dist worksteal -m "not slow" \
		--cov ebwm_dist --cov-report term:skip-covered

check: setup
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

clean:
	rm -rf .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist runs/quickstart runs/quickstart_ar \
		runs/halves runs/halves_ar \
		runs/denoise runs/denoise_dit runs/denoise_*.log \
		runs/video_patches runs/video_patches_ar runs/video_patches_dit runs/video_patches_*.log \
		runs/video_quickstart runs/video_quickstart_ar runs/video_shapes runs/video_shapes_ar runs/reasoning \
		runs/reasoning_ar1 runs/reasoning_ar2 runs/reasoning_ar4 runs/reasoning_ar*.log

$(SAMPLE): | setup
	$(VENV)/bin/python data_tools/fetch_text.py --out $@

$(TOKENIZER): $(SAMPLE)
	$(VENV)/bin/python data_tools/train_tokenizer.py --input $(SAMPLE) --vocab-size 1000 --out $@ \
		--exclude-fraction $(HOLDOUT)

$(SHARDS): $(TOKENIZER)
	$(VENV)/bin/python data_tools/tokenize_text.py --input $(SAMPLE) --tokenizer $(TOKENIZER) --out $(dir $@) \
		--sequence-length 128 --holdout-fraction $(HOLDOUT)

data/raw/halves.jsonl: $(SHARDS)
	$(VENV)/bin/python data_tools/tasks/halves.py --input $(SAMPLE) --out $@ --holdout-fraction $(HOLDOUT)

$(HALVES): data/raw/halves.jsonl
	$(VENV)/bin/python data_tools/tokenize_text.py --input $< --tokenizer $(TOKENIZER) --out $(dir $@) \
		--sequence-length 128 --holdout-fraction $(HOLDOUT)

.PRECIOUS: data/raw/pointers_hops%.jsonl
data/raw/pointers_hops%.jsonl: | setup
	$(VENV)/bin/python data_tools/tasks/pointers.py --out $@ --documents 40000 --hops 1 $* --seed $* \
		--deepest $(if $(filter 4,$*),9,$*)

data/raw/pointers_harder.jsonl: | setup
	$(VENV)/bin/python data_tools/tasks/pointers.py --out $@ --documents 4000 --hops 1 9 --queries 1 --seed 9

$(WORDS): data/raw/pointers_hops4.jsonl
	$(VENV)/bin/python data_tools/train_tokenizer.py --input $< --model-type word --vocab-size 702 --out $@ \
		--exclude-fraction 0.99

data/reasoning/%/manifest.json: data/raw/pointers_%.jsonl $(WORDS)
	$(VENV)/bin/python data_tools/tokenize_text.py --input $< --tokenizer $(WORDS) --out $(dir $@) \
		--sequence-length 29 --holdout-fraction $(if $(filter harder,$*),0.99,$(HOLDOUT))

# Every frame of the sample videos is used: they are short, and between frames further apart much changes.
$(VIDEO_SHARDS): | setup
	$(VENV)/bin/python data_tools/fetch_video.py --out $(VIDEOS)
	$(VENV)/bin/python data_tools/cut_clips.py --input $(VIDEOS) --out $(dir $@) \
		--frames 16 --frame-interval 0.04 --stride 0.04 --size 64 --holdout bikes.mp4

$(SHAPES_CLIPS): | setup
	$(VENV)/bin/python data_tools/fetch_video.py --source shapes --out $(SHAPES)
	$(VENV)/bin/python data_tools/cut_clips.py --input $(SHAPES) --out $(dir $@) \
		--frames 16 --frame-interval 0.08 --stride 0.32 --size 64 --holdout-fraction 0.1

$(SHAPES_LATENTS): $(SHAPES_CLIPS)
	$(VENV)/bin/python data_tools/encode_frames.py $(dir $<) --out $(dir $@) --encoder pixels:8

$(SHAPES_PATCHES): $(SHAPES_CLIPS)
	$(VENV)/bin/python data_tools/encode_frames.py $(dir $<) --out $(dir $@) --encoder pixels:16/4

data/raw/digits.npz: | setup
	$(VENV)/bin/python data_tools/fetch_images.py --out $@

$(DIGITS): data/raw/digits.npz
	$(VENV)/bin/python data_tools/pack_images.py --input $< --out $(dir $@) --holdout-fraction 0.2
