#!/usr/bin/env bash
# A hook with the Java compiler: fails where javac reports anything but names that it cannot know, since a row is one
# method out of its project. In a repository, run the build and the tests of the module instead.
set -uo pipefail

said=$(javac -proc:none -implicit:none -Xmaxerrs 100 -d . "$1" 2>&1) && exit 0
unknown='cannot find symbol|package .* does not exist|does not override or implement|invalid method declaration'
errors=$(grep -E '^[^ ]+\.java:[0-9]+: error: ' <<<"$said" | grep -vE "error: ($unknown)")
[ -n "$errors" ] || exit 0
head -n 20 <<<"$errors"
exit 1
