"""Functions over processes: nothing happens in one; two agree, on sums and on masks."""

import json
import subprocess
import sys

import torch

from tersor.training import ranks

TWO_PROCESSES = """
import json, sys, torch
from torch import distributed
from tersor.pruning import ActivationMeanRankPruner, LinearPruner, TaylorPruner
from tersor.training import ranks
from tests.pruning.training import DATA, evaluator_of, network
rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", store=distributed.FileStore(folder + "/store", 2), rank=rank, world_size=2)
value = torch.tensor([1.0, 2.0]) * (rank + 1)
told = [ranks.processes(), ranks.is_first_process(), ranks.sum_over_processes(value).tolist()]
told += [ranks.mean_over_processes(value).tolist(), ranks.of_first_process(value).tolist(), value.tolist()]
told += [ranks.of_first_process(torch.tensor([True, rank == 0])).tolist(), ranks.of_each_process(f"of {rank}")]
print(json.dumps(told))
config_list = [{"op_names": ["0", "3"], "sparse_ratio": 0.5}]
for pruner_class in (TaylorPruner, ActivationMeanRankPruner):
    model = network()
    evaluator = evaluator_of(model, lr=0.0)
    evaluator._loop._loader = DATA[2 * rank : 2 * rank + 2]
    pruner = pruner_class(model, config_list, evaluator, 2)
    schedule = LinearPruner(pruner, total_times=2, log_dir=f"{folder}/{pruner_class.__name__}")
    masks = schedule.compress(max_steps=1)[1]
    torch.manual_seed(rank)
    print(json.dumps([masks["0"]["bias"].tolist(), masks["3"]["bias"].tolist(), [of.metric for of in schedule.rounds]]))
    states = torch.load(f"{folder}/{pruner_class.__name__}/rounds.pt", weights_only=True)["random"] if rank == 0 else ""
    print(json.dumps(len(states)))
distributed.destroy_process_group()
"""


def test_one_process_gives_back_what_it_was_given():
    value = torch.ones(2)
    assert all(
        of(value) is value for of in (ranks.sum_over_processes, ranks.mean_over_processes, ranks.of_first_process)
    )
    assert (ranks.processes(), ranks.process(), ranks.is_first_process()) == (1, 0, True)
    assert ranks.of_each_process("x") == ["x"]


def test_two_processes_agree(tmp_path):
    commands = [[sys.executable, "-c", TWO_PROCESSES, str(rank), str(tmp_path)] for rank in range(2)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    first, second = (list(map(json.loads, of.communicate(timeout=120)[0].splitlines())) for of in running)
    shared = [[3.0, 6.0], [1.5, 3.0], [1.0, 2.0]]
    assert first[0] == [2, True, *shared, [1.0, 2.0], [True, True], ["of 0", "of 1"]]
    assert second[0] == [2, False, *shared, [2.0, 4.0], [True, True], ["of 0", "of 1"]]
    for line in (1, 3):
        assert first[line] == second[line]
        assert [sum(of) for of in first[line][:2]] == [4, 3]
    assert first[2] == first[4] == 2  # the random state of each
