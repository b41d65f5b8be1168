# docker build --build-arg ACCELERATOR=cuda --tag sae .
# docker run --rm --volume "$PWD:/data" sae train config.yaml
# docs/clusters.md, "An image", says how clusters use it.
FROM python:3.12-slim

# cpu, cuda or tpu: which JAX is installed.
ARG ACCELERATOR=cpu

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY activation_cache activation_cache
COPY sae_train sae_train
COPY launch launch
COPY configs /configs
# hadolint ignore=DL3013
RUN case "$ACCELERATOR" in \
        cpu) extras=hub,tensorboard ;; \
        cuda | tpu) extras="$ACCELERATOR,hub,tensorboard" ;; \
        *) echo "ACCELERATOR is cpu, cuda or tpu, and not '$ACCELERATOR'" >&2; exit 1 ;; \
    esac \
    && pip install --no-cache-dir ".[$extras]" \
    && mkdir -m 1777 /cache /data

# Any user id will do, with or without a home: what a user's cache keeps is in /cache.
ENV XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface
USER 10001:10001
WORKDIR /data
ENTRYPOINT ["sae"]
CMD ["--help"]
