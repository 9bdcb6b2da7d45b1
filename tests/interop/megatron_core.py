"""Shows that megatron-core loads a checkpoint: by its own code, strictly, on CPUs, and what the loaded model computes.

    python megatron_core.py FOLDER... --tensor T [--pipeline P]

A FOLDER has latest_checkpointed_iteration.txt (a number, or `release`) and that iteration in the `torch` format (names of
megatron-core, of either layer spec) or in `torch_dist`. T * P processes build the model from the training arguments that
the checkpoint keeps, and from nothing else, as Megatron's training does; they load it, and run `input_ids` of
FOLDER/ids.safetensors. FOLDER/logits.safetensors gets `logits`, float32 [rows, positions, vocabulary with its padding].

    torch       Every rank loads its own file, so that T and P have to be the file's. A missing tensor, one too many or one of
                another shape is an error. Extra states (of FP8) are no weights and are left out.
    torch_dist  Any T and P will do. A key that is missing in the checkpoint is an error, and so is one too many, but for the
                extra states that only modules of Transformer Engine have.

    python megatron_core.py FOLDER --dcp OUT.safetensors

reads a `torch_dist` iteration by torch.distributed.checkpoint alone, and writes all its tensors, whole, under their names.

Requirements: those of make_megatron.py (tests/golden/megatron).
"""

import argparse
import pathlib
import re
import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "golden" / "megatron"))
from make_megatron import build_chunks, on_ranks, run  # noqa: E402

warnings.filterwarnings("ignore")

# Modules of megatron-core's own have no such extra states, so that its local layer spec does not ask for them.
ONLY_IN_TE = re.compile(r"(core_attention|layernorm)\._extra_state/")


def iteration_of(folder):
    """The folder of the latest iteration."""
    latest = (folder / "latest_checkpointed_iteration.txt").read_text().strip()
    return folder / (latest if latest == "release" else f"iter_{int(latest):07d}")


def rank_file(iteration, pipeline):
    """This rank's file of the `torch` format."""
    from megatron.core import parallel_state as mpu

    leaf = f"mp_rank_{mpu.get_tensor_model_parallel_rank():02d}"
    if pipeline > 1:
        leaf += f"_{mpu.get_pipeline_model_parallel_rank():03d}"
    return iteration / leaf / "model_optim_rng.pt"


def local_names(state, args):
    """Names of megatron-core's local layer spec for a state dictionary of the TE spec, or of grouped experts."""
    local = {}
    for name, x in state.items():
        if name.endswith("_extra_state"):
            continue
        name = name.replace(".self_attention.linear_qkv.layer_norm_", ".input_layernorm.")
        name = name.replace(".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm.")
        name = re.sub(r"\.experts\.(linear_fc[12])\.weight(\d+)$", r".experts.local_experts.\2.\1.weight", name)
        grouped = re.fullmatch(r"(.*\.mlp\.experts\.)weight([12])", name)
        if grouped:
            # The views under which GroupedMLP multiplies: experts whose matrices are transposed.
            sides = (args.hidden_size, -1) if grouped[2] == "1" else (-1, args.hidden_size)
            for e, expert in enumerate(x.view(args.num_experts, *sides)):
                local[f"{grouped[1]}local_experts.{e}.linear_fc{grouped[2]}.weight"] = expert.T
        else:
            local[name] = x
    return local


def load_torch(iteration, chunks, args):
    """Loads this rank's file of the `torch` format."""
    file = torch.load(rank_file(iteration, args.pipeline_model_parallel_size))
    keys = [f"model{i}" for i in range(len(chunks))] if args.virtual_pipeline_model_parallel_size else ["model"]
    there = [key for key in file if re.fullmatch(r"model\d*", key)]
    if there != keys:
        raise ValueError(f"the file has {there}, not {keys}")
    for key, chunk in zip(keys, chunks):
        chunk.load_state_dict(local_names(file[key], args), strict=True)


def load_dist(iteration, chunks, args, content):
    """Loads this rank's part of a distributed checkpoint."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.validation import StrictHandling

    there = dcp.FileSystemReader(iteration).read_metadata().state_dict_metadata
    if any(name.endswith("pre_mlp_layernorm.weight") for name in there):
        # In front of experts this norm is a module of its own. The local spec calls it mlp.linear_fc1.layer_norm_weight in
        # distributed checkpoints nevertheless; the TE spec does not.
        for chunk in chunks:
            for layer in chunk.decoder.layers:
                layer.submodules_config.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    keys = [f"model{i}" for i in range(len(chunks))]
    wanted = {key: chunk.sharded_state_dict(metadata=dict(content)) for key, chunk in zip(keys, chunks)}
    # Asked for, so that strictness can be had of everything else: by every rank, of which the first counts.
    objects = [ShardedObject.empty_from_unique_key(name, dist.get_rank()) for name in there if ONLY_IN_TE.search(name)]
    wanted |= {x.unique_key: x for x in objects}
    loaded = dist_checkpointing.load(wanted, str(iteration), strict=StrictHandling.RAISE_ALL)
    for key, chunk in zip(keys, chunks):
        chunk.load_state_dict(loaded[key], strict=True)


def stated(iteration, distributed, tensor, pipeline):
    """The training arguments of a checkpoint, for a run of these sizes, and what it says of the layout of its tensors."""
    from megatron.core import dist_checkpointing

    if distributed:
        file = dist_checkpointing.load_common_state_dict(str(iteration))
    else:
        leaf = "mp_rank_00" if pipeline == 1 else "mp_rank_00_000"
        file = torch.load(iteration / leaf / "model_optim_rng.pt")
    if file["checkpoint_version"] != 3.0:
        raise ValueError(f"checkpoint_version is {file['checkpoint_version']}")
    args = file["args"]
    sizes = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
    if not distributed and sizes != (tensor, pipeline):
        raise ValueError(f"the file says T={sizes[0]}, P={sizes[1]}")
    if sizes[1] != pipeline:
        args.virtual_pipeline_model_parallel_size = None
    args.tensor_model_parallel_size = args.expert_tensor_parallel_size = tensor
    args.pipeline_model_parallel_size = pipeline
    # The weights are loaded in their own type; the model computes in float32.
    args.fp16 = args.bf16 = False
    return args, file.get("content_metadata") or {}


def check_all(folders, tensor, pipeline):
    """One rank: a folder after the other."""
    from megatron.core import parallel_state as mpu
    from megatron.core.safe_globals import register_safe_globals

    register_safe_globals()  # torch.load refuses other classes, and Megatron does not tell it to accept them
    for folder in folders:
        try:
            check(folder, tensor, pipeline)
        except Exception as e:
            raise RuntimeError(f"{folder}: {e}") from e
        dist.barrier()
        mpu.destroy_model_parallel()


def check(folder, tensor, pipeline):
    """Builds the model, loads it, runs it."""
    from megatron.core import parallel_state as mpu

    iteration = iteration_of(folder)
    distributed = (iteration / "metadata.json").exists()
    args, content = stated(iteration, distributed, tensor, pipeline)
    chunks = build_chunks(args)
    if distributed:
        load_dist(iteration, chunks, args, content)
    else:
        load_torch(iteration, chunks, args)
    logits = run([chunk.float() for chunk in chunks], load_file(folder / "ids.safetensors")["input_ids"])
    if logits is not None and mpu.get_tensor_model_parallel_rank() == 0:
        save_file({"logits": logits.contiguous()}, folder / "logits.safetensors")


def read_with_dcp(iteration, out):
    """All tensors of a distributed checkpoint, by torch alone."""
    reader = dcp.FileSystemReader(iteration)
    there = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in there.items()
        if isinstance(entry, dcp.metadata.TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    save_file(tensors, out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=pathlib.Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--tensor", type=int, metavar="T")
    parser.add_argument("--pipeline", type=int, metavar="P", default=1)
    parser.add_argument("--dcp", type=pathlib.Path, metavar="OUT")
    options = parser.parse_args()
    if options.dcp:
        read_with_dcp(iteration_of(options.folders[0]), options.dcp)
    elif not options.tensor:
        parser.error("--tensor is needed, or --dcp")
    else:
        sizes = (options.tensor, options.pipeline)
        on_ranks(sizes[0] * sizes[1], check_all, options.folders, *sizes)


if __name__ == "__main__":
    main()
