"""What is said where OpenVINO is missing: it has no wheel for every system."""


def no_openvino(error: ImportError) -> str:
    """What to do where OpenVINO, which computes embeddings, cannot be imported."""
    why = "has no OpenVINO" if isinstance(error, ModuleNotFoundError) else f"cannot load OpenVINO ({error})"
    return (
        f"This Python {why}, so that no model can be served here. Install it (`pip install openvino`) where it has a"
        " wheel: README names the platforms. Elsewhere run `embedmesh gateway`, with nodes on other machines or servers"
        " of other makes (`embedmesh nodes add URL`)."
    )
