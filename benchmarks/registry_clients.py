"""The clients of ``registry_mlflow.py``: each product's own, driven by the same code, in a process of its own.

    python benchmarks/registry_clients.py {mlflow,t2} URL COMMAND…

Needs nothing but the product's client, so that it runs in MLflow's environment too. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

PAGE = 50


class Product(Protocol):
    """What is measured of a product."""

    def publish(self, name: str, file: Path) -> None:
        """Log a file and register it under a new name; it is there for others once this returns."""
        ...

    def page(self, token: Any) -> tuple[int, Any]:
        """One page of the list by name: how many entries, and where the next page begins."""
        ...


class Mlflow:
    """MLflow by its Python client."""

    def __init__(self, url: str) -> None:
        from mlflow import MlflowClient  # type: ignore[import-not-found]  # only in its own environment

        self._client = MlflowClient(url, url)
        self._experiment = "0"

    def publish(self, name: str, file: Path) -> None:
        run = self._client.create_run(self._experiment)
        self._client.log_artifact(run.info.run_id, str(file), "model")
        self._client.create_registered_model(name)
        source = f"{run.info.artifact_uri}/model"
        self._client.create_model_version(name, source, run.info.run_id, await_creation_for=0)

    def page(self, token: Any) -> tuple[int, Any]:
        found = self._client.search_registered_models(max_results=PAGE, page_token=token)
        assert found[0].latest_versions
        return len(found), found.token


class T2:
    """t2 by its Python client."""

    def __init__(self, url: str) -> None:
        from t2.core.references import ExpertName
        from t2.registry.open import open_registry
        from t2.registry.schemas import ExpertQuery

        self._client = open_registry(url)
        self._name = ExpertName
        self._query = ExpertQuery(sort="name")

    def publish(self, name: str, file: Path) -> None:
        assert self._client.publish(self._name("benchmark", name), file.read_bytes()).created

    def page(self, token: Any) -> tuple[int, Any]:
        found = self._client.list_experts(self._query, cursor=token, limit=PAGE)
        assert found.items[0].latest is not None
        return len(found.items), found.next


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("product", choices=("mlflow", "t2"))
    parser.add_argument("url")
    parser.add_argument("command", choices=("publish", "list"))
    parser.add_argument("--files", type=Path, help="a folder of files to publish")
    parser.add_argument("--prefix", default="", help="of the names published under")
    parser.add_argument("--entries", type=int, help="how many there are to list")
    parser.add_argument("--seconds", type=float, default=10.0, help="for which each list is asked for")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    product: Product = Mlflow(args.url) if args.product == "mlflow" else T2(args.url)
    if args.command == "publish":
        files = sorted(args.files.iterdir())
        seconds = _spread([partial(product.publish, args.prefix + file.stem, file) for file in files], args.threads)
        print(json.dumps({"rate": len(files) / seconds, "count": len(files)}))
    else:
        first = product.page(None)[1]
        deep, seen = first, PAGE
        while seen + 2 * PAGE <= args.entries * 99 // 100:
            deep = product.page(deep)[1]
            seen += PAGE
        found = {where: _listing(product, token, args) for where, token in (("first", None), ("deep", deep))}
        print(json.dumps(found | {"depth": seen}))


def _listing(product: Product, token: Any, args: argparse.Namespace) -> dict[str, float]:
    end = time.perf_counter() + args.seconds

    def ask() -> int:
        done = 0
        while time.perf_counter() < end:
            assert product.page(token)[0] == PAGE
            done += 1
        return done

    began = time.perf_counter()
    with ThreadPoolExecutor(args.threads) as pool:
        counts = [future.result() for future in [pool.submit(ask) for _ in range(args.threads)]]
    return {"rate": sum(counts) / (time.perf_counter() - began), "count": sum(counts)}


def _spread(tasks: list[Callable[[], None]], threads: int) -> float:
    """Seconds that all tasks take, shared out among threads."""
    tasks[0]()
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(task) for task in tasks[1:]]:
            future.result()
    return (time.perf_counter() - began) * len(tasks) / (len(tasks) - 1)


if __name__ == "__main__":
    main()
