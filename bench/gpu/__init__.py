"""Everything that needs a GPU, in two commands: build, tests, sanitizers, benchmarks.

__main__.py     the command line and the files a run leaves
plan.py         which stages there are, and their time limits
running.py      stages as processes with limits
environment.py  what machine this is
prepare.py      what a machine without a network needs brought along
pytest_log.py   a pytest plugin: failures are reported as they happen
ranks.py        one device as every rank in turn, for bench.gpu_engine
memory.py       one device as every rank at once, which exchange as over NCCL
stages.py       what a rank's device does, and what a link adds
graphs.py       a rank's call as CUDA graphs
"""
