# docker build -t megu . && docker run --rm -v "$PWD:/work" megu run -c megu.yaml
FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY megu_cli megu_cli
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir /wheels/*.whl && rm -r /wheels
# Not root: what megu writes into a mounted folder belongs to whom `--user "$(id -u):$(id -g)"` names.
RUN useradd --create-home megu
USER megu
ENV HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /work
ENTRYPOINT ["megu"]
CMD ["--help"]
