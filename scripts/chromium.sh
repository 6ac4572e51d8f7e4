#!/usr/bin/env bash
# Debian's Chromium, for the tests that open pages; where it cannot be installed they are skipped and say so.
set -u
command -v chromium >/dev/null && exit 0
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium >/dev/null
fi
command -v chromium >/dev/null || echo "no chromium here: the tests that open pages will be skipped" >&2
exit 0
