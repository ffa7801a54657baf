"""Start the dashboard: 127.0.0.1 only, no telemetry, the sample study in place."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from bitatlas.kernels.errors import UserError

__all__ = ["serve", "streamlit_command"]


def streamlit_command(port: int, address: str = "127.0.0.1") -> list[str]:
    """The command line of the page server. Flags repeat what .streamlit/config.toml says, so they hold from any folder."""
    main = Path(__file__).resolve().parent / "main.py"
    return [
        sys.executable, "-m", "streamlit", "run", str(main),
        "--server.headless=true", f"--server.port={port}", f"--server.address={address}",
        "--browser.gatherUsageStats=false", "--server.fileWatcherType=none", "--server.maxUploadSize=5",
        "--client.toolbarMode=minimal", "--server.enableStaticServing=false",
    ]  # fmt: skip


def serve(model: str | None, port: int) -> None:
    """Prepare the store and replace this process by the page server.

    Args:
        model: a checkpoint to open on; None = the demo's sample study.
        port: TCP port on 127.0.0.1.

    Raises:
        UserError: the port is taken, or the checkpoint cannot be read.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise UserError(
                f"port {port} is taken",
                found="something answers there already",
                fix=f"bitatlas serve --port {port + 1}",
            )
    from bitatlas.app import tasks

    tasks.demo()
    index = tasks.open_index("demo")
    env = os.environ.copy()
    if model:
        index = tasks.register(model)
        # The browser may open what the shell user opened, and nothing beside it.
        roots = [r for r in env.get("BITATLAS_MODEL_ROOTS", "").split(os.pathsep) if r]
        env["BITATLAS_MODEL_ROOTS"] = os.pathsep.join([*roots, index.path])
    # Inside a container the published port must listen on all interfaces; the container publishes it on 127.0.0.1.
    address = "0.0.0.0" if env.get("BITATLAS_IN_CONTAINER") == "1" else "127.0.0.1"
    print(f"bitatlas: http://127.0.0.1:{port}/?study={index.name}@{index.digest[:8]}", flush=True)
    command = streamlit_command(port, address)
    os.execvpe(command[0], command, env)
