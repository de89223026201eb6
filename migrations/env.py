"""How Alembic reaches the database: over the connection that ``t2.registry.db.migrate`` hands it."""

from alembic import context

from t2.registry.db.models import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    # SQLite cannot alter most of a table: it is copied.
    render_as_batch=True,
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
