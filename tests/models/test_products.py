import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models.products import product_by_rows


def given(dtype="float32"):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    return draw(3, 8), draw(16, 8)


@pytest.mark.parametrize("compiled", [False, True])
def test_it_is_the_product_with_the_kernel_turned(compiled):
    x, kernel = given()
    product = jax.jit(product_by_rows) if compiled else product_by_rows
    np.testing.assert_allclose(
        product(x, kernel), np.asarray(x) @ np.asarray(kernel).T, rtol=1e-5, atol=1e-6
    )


def test_the_result_has_the_dtype_of_x_or_the_one_asked_for():
    x, kernel = given("bfloat16")
    assert product_by_rows(x, kernel).dtype == jnp.bfloat16
    wide = product_by_rows(x, kernel, dtype=jnp.float32)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T
    np.testing.assert_allclose(wide, exact, rtol=1e-5, atol=1e-6)


def test_a_cpu_takes_the_kernel_as_the_left_factor_also_where_the_rest_is_in_rows():
    # Else XLA turns the whole kernel at every product; only speed would show it.
    def rows(x, kernel):
        return jax.nn.relu(product_by_rows(x, kernel)) + 1.0

    text = jax.jit(rows).lower(*given()).compile().as_text()
    products = [line for line in text.splitlines() if " dot(" in line]
    assert len(products) == 1
    assert "f32[16,3]" in products[0].split(" dot(")[0]


def test_the_gradient_is_that_of_the_plain_product():
    x, kernel = given()
    total = lambda product: lambda x, kernel: jnp.sum(jnp.tanh(product(x, kernel)))  # noqa: E731
    found = jax.grad(total(product_by_rows), argnums=(0, 1))(x, kernel)
    plain = jax.grad(total(lambda x, kernel: x @ kernel.T), argnums=(0, 1))(x, kernel)
    for ours, theirs in zip(found, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
