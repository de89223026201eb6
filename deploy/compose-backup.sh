#!/bin/sh
# Backup of the registry of compose.yaml into a folder, and the way back:
#
#     deploy/compose-backup.sh save FOLDER
#     deploy/compose-backup.sh load FOLDER
#
# load needs an empty database and stopped servers. It starts PostgreSQL and the store first, the registry last.
set -eu
action=${1:-}
if [ $# -ne 2 ] || { [ "$action" != save ] && [ "$action" != load ]; }; then
    echo "backup: write $0 save FOLDER, or $0 load FOLDER" >&2
    exit 2
fi
fail() { echo "backup: $1" >&2; exit 2; }
compose() { docker compose --file "$(dirname "$0")/compose.yaml" "$@"; }
in_postgres() { compose exec -T postgres "$@"; }
files() {
    compose run --rm -T --no-deps --user "$(id -u)" --volume "$folder:/backups" --entrypoint python registry \
        /opt/t2/backup.py "$action" /backups --only blobs --config /run/secrets/registry.toml
}

if [ "$action" = save ]; then
    mkdir -p "$2"
    folder=$(cd "$2" && pwd)
    # The previous dump stays until the new one is complete.
    partial="$folder/registry.dump.partial"
    trap 'rm -f "$partial"' EXIT
    trap 'exit 130' INT TERM
    in_postgres pg_dump --username t2 --format custom --no-owner --no-privileges registry > "$partial" \
        || fail "pg_dump failed; the previous dump is unchanged"
    sync "$partial"
    mv "$partial" "$folder/registry.dump"
    echo "database saved to $folder/registry.dump"
    files
else
    [ -f "$2/registry.dump" ] || fail "$2/registry.dump: no such file; give the folder of a backup"
    [ -d "$2/blobs" ] || fail "$2/blobs: no such folder; give the folder of a backup"
    folder=$(cd "$2" && pwd)
    compose up --detach --wait postgres garage
    tables=$(in_postgres psql --username t2 --dbname registry --tuples-only --no-align \
        --command "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") || fail "cannot reach PostgreSQL"
    [ "$tables" = 0 ] || fail "the database is not empty; restore into a new one (docker compose down --volumes removes this one)"
    files
    in_postgres pg_restore --username t2 --dbname registry --exit-on-error --single-transaction \
        --no-owner --no-privileges --no-comments < "$folder/registry.dump" \
        || fail "pg_restore failed; the database is still empty"
    echo "database restored"
    compose up --detach
fi
