"""Migrations of the registry's database (Alembic), run by `t2 registry migrate`."""
