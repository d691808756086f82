"""`tessera models`."""


def models() -> None:
    """List the models that come with Tessera.

    All commands and tessera.load accept their names in place of a path. No download is needed.

    \b
    Example:
      tessera models
    """
    from tessera import pretrained
    from tessera.bundle import load_config
    from tessera.reporting.text import format_bytes

    for name in pretrained.names():
        folder = pretrained.FOLDER / name
        config = load_config(folder)
        size = format_bytes(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
        print(f"{name}: {config.provenance.about}")
        print(f"  {config.network.summary()}; {size}; license: {config.provenance.license}")
        condition = '--prompt "smiling cat" --seeds 0-3' if config.network.uses_text else "--classes all --per-class 4"
        print(f"  tessera sample {name} {condition}")
