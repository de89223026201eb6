"""Every setting of a registry server, from environment variables or a TOML file; docs/registry.md has the table.

``T2_REGISTRY_DATABASE_URL`` sets ``database_url``, and so on; in the file the names are without the prefix. The
environment wins over the file.
"""

from __future__ import annotations

import os
import tomllib
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from t2.core.errors import ArgumentError, nearest
from t2.core.settings import registry_dir
from t2.registry.services.actor import Limits

PREFIX = "T2_REGISTRY_"
_CLIENT = ("URL", "TOKEN", "ALLOW_HTTP")
"""Variables of the same prefix that are the client's."""


class ServerSettings(BaseSettings):
    """Settings of a registry server.

    Attributes are documented by their ``description``, which the documentation's table repeats.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    database_url: SecretStr = Field(
        default_factory=lambda: SecretStr(f"sqlite:///{registry_dir() / 'registry.db'}"),
        description="`sqlite:////path/registry.db` or `postgresql://user:password@host/name`",
    )
    database_pool: int = Field(
        default=20,
        ge=2,
        le=500,
        description="most database connections of each worker: two fifths for writes, the others for reads",
    )
    database_timeout: float = Field(
        default=10.0, gt=0, le=600, description="seconds to wait for a connection, a lock or a statement"
    )
    blobs: str = Field(
        default_factory=lambda: str(registry_dir() / "blobs"),
        description="where files lie: a folder, or `s3://bucket/prefix`",
    )
    s3_endpoint: str | None = Field(default=None, description="URL of an S3-compatible store; AWS without")
    s3_region: str = Field(default="us-east-1", description="region of the bucket")
    s3_access_key: SecretStr | None = Field(
        default=None, description="access key; boto3's own chain of credentials without"
    )
    s3_secret_key: SecretStr | None = Field(default=None, description="secret key")
    s3_path_style: bool = Field(default=True, description="`endpoint/bucket/key` and not `bucket.endpoint/key`")
    s3_timeout: float = Field(default=10.0, gt=0, le=600, description="seconds to wait for the store")
    presign: bool = Field(
        default=False, description="send downloads to the store by presigned URLs, and not through the server"
    )
    presign_seconds: int = Field(default=300, ge=1, le=604_800, description="how long such a URL is good")
    host: str = Field(default="127.0.0.1", description="address to listen on; a public one needs a token first")
    port: int = Field(default=8470, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    workers: int = Field(default=1, ge=1, le=64, description="processes; more than one needs PostgreSQL")
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="names that clients may call the server by, joined by commas; without, any on a public address",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="origins whose pages may read, joined by commas; none by default"
    )
    max_upload_bytes: int = Field(
        default=64 * 1024 * 1024, ge=1024, le=64 * 1024 * 1024, description="largest file of an expert or a run"
    )
    max_body_bytes: int = Field(default=4 * 1024 * 1024, ge=1024, description="largest body of any other request")
    max_points: int = Field(default=100_000, ge=1, description="points of one reward curve")
    concurrent_uploads: int = Field(
        default=4,
        ge=1,
        le=1000,
        description="uploads that each worker checks and stores at the same time; others wait for `queue_seconds`",
    )
    read_threads: int = Field(default=10, ge=1, le=200, description="concurrent reads of each worker")
    write_threads: int = Field(default=4, ge=1, le=200, description="concurrent writes of each worker, without uploads")
    queue_seconds: float = Field(
        default=5.0, gt=0, le=600, description="how long a request waits for a thread or memory before status 503"
    )
    memory_bytes: int = Field(
        default=512 * 1024 * 1024,
        ge=1024 * 1024,
        description="memory of each worker in bytes for bodies, answers and the work on them",
    )
    memory_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="share of the memory for bodies and answers that one address or token may use",
    )
    max_body_values: int = Field(default=100_000, ge=100, description="values in one JSON body")
    max_head_bytes: int = Field(
        default=32 * 1024, ge=1024, description="largest head of a request: its first line and its headers"
    )
    max_connections: int = Field(
        default=1000,
        ge=1,
        description="most connections of each worker; beyond them only `/healthz` is answered, and waiting ones close",
    )
    connections_per_address: int = Field(
        default=500, ge=1, description="most connections from one address; trusted proxies have no such limit"
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="addresses or networks of proxies whose `X-Forwarded-For` names the client, joined by commas",
    )
    head_seconds: float = Field(default=20.0, gt=0, le=600, description="how long a client may take to send a head")
    idle_seconds: int = Field(default=10, ge=1, le=600, description="how long an idle connection stays open")
    stall_seconds: float = Field(
        default=30.0, gt=0, le=600, description="how long a body or an answer may make no progress"
    )
    slow_seconds: float = Field(
        default=20.0, gt=0, le=600, description="how long a body or an answer may be slower than `slowest_rate`"
    )
    slowest_rate: int = Field(
        default=64 * 1024, ge=1, description="least bytes per second, on average, of a body or an answer"
    )
    body_seconds: float = Field(default=600.0, gt=0, description="how long a client may take to send a body")
    min_free_bytes: int = Field(
        default=256 * 1024 * 1024,
        ge=0,
        description="least free bytes on the disks of an SQLite file and of a folder of blobs for `/readyz` to succeed",
    )
    idempotency_hours: float = Field(
        default=24.0, gt=0, le=876_000, description="for which the key of an upload is remembered"
    )
    gc_grace_seconds: float = Field(
        default=3600.0,
        ge=0,
        le=3_153_600_000,
        description="how long `gc` leaves a file alone that no version and no run has",
    )
    retention_days: float = Field(default=30.0, ge=0, le=36_500, description="after which `gc` drops what was deleted")
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$", description="of the server's log")

    @pydantic.field_validator("allowed_hosts", "cors_origins", "trusted_proxies", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @pydantic.field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            ip_network(each)
        return value

    @model_validator(mode="after")
    def _together(self) -> ServerSettings:
        if (self.s3_access_key is None) != (self.s3_secret_key is None):
            raise ValueError("s3_access_key and s3_secret_key go together")
        if self.workers > 1 and self.database_url.get_secret_value().startswith("sqlite"):
            raise ValueError("workers: more than one needs PostgreSQL")
        largest = max(self.max_upload_bytes, self.max_body_bytes)
        if self.memory_bytes < 2 * largest:
            raise ValueError(f"memory_bytes: {self.memory_bytes} is less than twice the largest body, {largest} bytes")
        return self

    @property
    def limits(self) -> Limits:
        """What the registry takes at most."""
        return Limits(
            upload_bytes=self.max_upload_bytes, points=self.max_points, idempotency_hours=self.idempotency_hours
        )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # What load_settings passes comes from the file, and the environment wins over it.
        return env_settings, init_settings


def load_settings(file: Path | None = None, **overrides: Any) -> ServerSettings:
    """Read the settings.

    Args:
        file: a TOML file.
        overrides: options of the command line, which win over all; None for those not given.

    Raises:
        ArgumentError: a setting is unknown or out of range, or the file cannot be read. No value is in the message.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError(
                f"cannot read the settings {file}: {getattr(error, 'strerror', None) or error}"
            ) from error
        except tomllib.TOMLDecodeError as error:
            raise ArgumentError(f"the settings {file} are not TOML: {error}") from None
    known = set(ServerSettings.model_fields)
    for name in values:
        if name not in known:
            raise ArgumentError(f"{file}: there is no setting {name}{nearest(name, known)}")
    for variable in os.environ:
        name = variable.removeprefix(PREFIX)
        if variable.startswith(PREFIX) and name not in _CLIENT and name.lower() not in known:
            raise ArgumentError(
                f"there is no setting {variable}{nearest(variable, [PREFIX + each.upper() for each in known])}"
            )
    try:
        settings = ServerSettings(**values)
        given = {name: value for name, value in overrides.items() if value is not None}
        return ServerSettings.model_validate(settings.model_copy(update=given).model_dump()) if given else settings
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ArgumentError(
            f"setting {where} ({PREFIX}{where.upper()}): {message}" if where else f"settings: {message}"
        ) from None
