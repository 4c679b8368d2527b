"""The knobs of devices and batch, and the mesh that they make."""

from typing import Annotated, Any, Literal

import fiddle as fdl

from configs.bounds import Above, AtLeast
from configs.knobs import Knobs
from paxlike import parallel
from paxlike.train.ramp import Ramp


class MeshKnobs(Knobs):
    """Devices and batch."""

    ICI_MESH_SHAPE: Annotated[
        tuple[int, ...], "mesh inside a node, [data, fsdp, tensor]; -1: what is left"
    ] = (8, 1, 1)
    DCN_MESH_SHAPE: Annotated[tuple[int, ...], "mesh across nodes, multiplied elementwise"] = (
        1,
        1,
        1,
    )
    MESH_AXES: Annotated[
        tuple[str, ...], "names of the mesh axes, outermost first; pipeline and context are others"
    ] = parallel.AXES
    SEQUENCE_PARALLEL: Annotated[
        bool, "the residual stream spread along the sequence over tensor, norms and dropout with it"
    ] = False
    CONTEXT_PARALLEL: Annotated[
        Literal["ring", "all_gather", "all_to_all"],
        "how attention works where MESH_AXES has a context axis, over which tokens of a row are spread",
    ] = "ring"
    PERCORE_BATCH_SIZE: Annotated[
        float, "rows per device and step, may be a fraction", Above(0)
    ] = 4
    NUM_MICROBATCHES: Annotated[
        int,
        "parts of the batch: follow one another through a pipeline, or are accumulated",
        AtLeast(1),
    ] = 1
    MICROBATCH_SIZE: Annotated[
        int | None, "rows of such a part over all devices, in place of NUM_MICROBATCHES", AtLeast(1)
    ] = None
    NUM_STAGES: Annotated[
        int | None,
        "pipeline stages: the first of four mesh sizes; None: what MESH_AXES say",
        AtLeast(1),
    ] = None
    CIRCULAR_REPEAT: Annotated[
        int,
        "times that a microbatch goes through the pipeline, each time with other layers",
        AtLeast(1),
    ] = 1
    PIPELINE_GATHER_ONCE: Annotated[
        bool,
        "stages gather weights over fsdp once a step, not for each microbatch: less is sent, more is held",
    ] = True
    BATCH_RAMP: Annotated[
        tuple[int, ...],
        "rows of the first batch, increment, rows until the batch is whole; []: whole at once",
    ] = ()
    GRADIENT_ACCUMULATION_DTYPE: Annotated[
        Literal["float32", "bfloat16"], "in which the gradients of microbatches are added"
    ] = "float32"
    ZERO_STAGE: Annotated[
        Literal[1, 2, 3],
        "what ZERO_AXES shard: 1 optimizer state, 2 and gradients, 3 and (over fsdp) parameters",
    ] = 3
    ZERO_AXES: Annotated[
        tuple[str, ...], "mesh axes over which the optimizer state is sharded, such as [fsdp, data]"
    ] = ("fsdp",)
    OFFLOAD_OPTIMIZER_STATE: Annotated[
        bool, "keep it in the memory of the host between its uses"
    ] = False
    FPROP_DTYPE: Annotated[
        Literal["bfloat16", "float32"], "compute dtype; parameters are float32"
    ] = "bfloat16"

    def mesh(self) -> parallel.Mesh:
        """The mesh that the knobs describe.

        Raises:
          ValueError: NUM_STAGES is not what the mesh has.
        """
        axes, ici, dcn = self.MESH_AXES, self.ICI_MESH_SHAPE, self.DCN_MESH_SHAPE
        if self.NUM_STAGES is not None and axes == parallel.AXES and len(ici) == len(axes) + 1:
            axes, dcn = ("pipeline", *axes), (1,) * (len(ici) - len(dcn)) + dcn
        if set(dcn) == {1}:  # nothing crosses nodes, whatever the axes
            dcn = (1,) * len(ici)
        mesh = parallel.Mesh(ici=ici, dcn=dcn, axes=axes)
        stages = mesh.shape.get("pipeline", 1)
        if self.NUM_STAGES not in (None, stages):
            raise ValueError(
                f"NUM_STAGES={self.NUM_STAGES}, but the mesh has {stages} pipeline stage(s): give ICI_MESH_SHAPE and "
                f"DCN_MESH_SHAPE four entries, of {', '.join(('pipeline', *parallel.AXES))}, whose first ones multiply "
                f"to {self.NUM_STAGES}"
            )
        return mesh

    def microbatches(self) -> int:
        """Parts of the batch.

        Raises:
          ValueError: MICROBATCH_SIZE does not divide the batch, or is given beside NUM_MICROBATCHES.
        """
        size, mesh = self.MICROBATCH_SIZE, self.mesh()
        if size is None:
            return self.NUM_MICROBATCHES
        if self.NUM_MICROBATCHES != 1:
            raise ValueError(
                f"MICROBATCH_SIZE={size} and NUM_MICROBATCHES={self.NUM_MICROBATCHES} say the same: leave one out"
            )
        if -1 in mesh.ici:
            raise ValueError(
                f"MICROBATCH_SIZE={size} needs the sizes of the mesh, and ICI_MESH_SHAPE={list(mesh.ici)} leaves one "
                "open: set NUM_MICROBATCHES"
            )
        rows = mesh.global_batch_size(self.PERCORE_BATCH_SIZE)
        if size < 1 or rows % size:
            raise ValueError(f"MICROBATCH_SIZE={size} does not divide the batch of {rows} rows")
        return rows // size

    def rules(self) -> fdl.Config[Any] | None:
        """What is spread over which mesh axis; None for the default."""
        if not self.SEQUENCE_PARALLEL:
            return None
        return fdl.Config(parallel.rules_with, residual_length=("context", "tensor"))

    def batch_growth(self) -> fdl.Config[Ramp] | None:
        """Smaller batches at the start, if asked for."""
        if not self.BATCH_RAMP:
            return None
        if len(self.BATCH_RAMP) != 3:
            raise ValueError(
                f"BATCH_RAMP={list(self.BATCH_RAMP)} must be [first batch, increment, rows], all in rows"
            )
        start, increment, rows = self.BATCH_RAMP
        return fdl.Config(Ramp, start=start, increment=increment, rows=rows)
