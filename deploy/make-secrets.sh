#!/bin/sh
# Makes the random secrets that compose.yaml reads, in deploy/secrets; does nothing where they are there already.
set -eu
cd "$(dirname "$0")"
if [ -e secrets ]; then
    echo "deploy/secrets is there already; move it away to make new ones" >&2
    exit 2
fi
random() { od -An -v -tx1 -N "$1" /dev/urandom | tr -d ' \n'; }
password=$(random 32)
access="GK$(random 12)"
secret=$(random 32)

# Nobody else gets into the folder. Its files can be read by all, because the containers' users are others.
umask 077
mkdir secrets
umask 022
printf '%s' "$password" > secrets/postgres_password
cat > secrets/registry.toml <<END
database_url = "postgresql://t2:$password@postgres/registry"
s3_access_key = "$access"
s3_secret_key = "$secret"
END
cat > secrets/garage.env <<END
GARAGE_RPC_SECRET=$(random 32)
GARAGE_DEFAULT_ACCESS_KEY=$access
GARAGE_DEFAULT_SECRET_KEY=$secret
GARAGE_DEFAULT_BUCKET=t2-experts
END
echo "made deploy/secrets; keep a copy where the backups are not"
