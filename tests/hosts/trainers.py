"""Small runs in the Hugging Face Trainer: a Llama of random weights, fixed data, growths at evaluations."""

import itertools
import tempfile

import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

import auxin as ax
from auxin.hosts.transformers import GrowthCallback

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

STEPS, EVERY = 12, 3  # four evaluations, each with a checkpoint
GROWN_AT = (1, 3)  # by which of them the network has grown: depths 2, 3, 3, 4 from there on


class Data(torch.utils.data.Dataset):
    def __init__(self, count: int, seed: int):
        self.ids = torch.randint(0, 20, (count, 8), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


PROBE = {"input_ids": Data(2, 3).ids}
TRAIN, TEST = Data(64, 0), Data(8, 1)


def llama(layers=2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def growth(**options):
    own = {"edits": ax.Duplicate("model.layers", by=1), "when": ax.when.at(GROWN_AT), "probe": PROBE}
    return GrowthCallback(**{**own, **options})


def trainer_of(model, *callbacks, out=None, best=None, test=TEST, optimizers=(None, None), **options):
    """A Trainer that evaluates and saves every third step; ``best``: the number of the evaluation that is the best."""
    own = {
        "output_dir": out or tempfile.mkdtemp(),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "eval_strategy": "steps",
        "eval_steps": EVERY,
        "save_steps": EVERY,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    extra = {}
    if best is not None:
        numbers = itertools.count(1)
        extra["compute_metrics"] = lambda _: {"planned": float(next(numbers) == best)}
        own |= {"load_best_model_at_end": True, "metric_for_best_model": "planned", "greater_is_better": True}
    arguments = TrainingArguments(**{**own, **options})
    made = Trainer(
        model,
        arguments,
        train_dataset=TRAIN,
        eval_dataset=test,
        callbacks=list(callbacks),
        optimizers=optimizers,
        **extra,
    )
    made.remove_callback(PrinterCallback)
    return made


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def checkpoint(trainer, evaluation):
    return f"{trainer.args.output_dir}/checkpoint-{evaluation * EVERY}"


def moments(model, optimizer):
    """First moments by the name of the parameter."""
    return {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters() if p in optimizer.state}


def assert_equal_tensors(one, other):
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def assert_same_model(model: nn.Module, stock: nn.Module):
    """Names, values, configuration, indices and outputs."""
    assert_equal_tensors(model.state_dict(), stock.state_dict())
    left_out = ("_name_or_path", "architectures", "dtype")  # what saving and loading write into it
    ours, theirs = ({k: v for k, v in m.config.to_dict().items() if k not in left_out} for m in (model, stock))
    assert ours == theirs
    for m in (model, stock):
        assert [block.self_attn.layer_idx for block in m.model.layers] == list(range(m.config.num_hidden_layers))
        m.eval()
    assert torch.equal(model(**PROBE).logits, stock(**PROBE).logits)
