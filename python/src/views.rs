//! Operations of torch that are only views, passed on without a step of Python.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::{MutexExt, PyOnceLock};
use pyo3::types::{PyDict, PyTuple};

/// A base of a dispatch mode, which does views itself and asks its subclass about all else.
///
/// torch calls a mode at each operation; most of those that put a tensor in its place are views. Being native, it is
/// nothing that torch's compiler could look into either.
#[pyclass(frozen, subclass, module = "serverless_llm._native")]
pub(crate) struct ViewsFirst {
    /// By the operation's address.
    views: Mutex<HashMap<usize, View>>,
}

struct View {
    /// Does it.
    call: Py<PyAny>,
    /// Held, so that the address stays its own.
    _operation: Py<PyAny>,
}

#[pymethods]
impl ViewsFirst {
    #[new]
    #[pyo3(signature = (*_args, **_kwargs))]
    fn new(_args: &Bound<'_, PyTuple>, _kwargs: Option<&Bound<'_, PyDict>>) -> ViewsFirst {
        ViewsFirst { views: Mutex::default() }
    }

    /// From now on `call` does `operation`, and the subclass does not see it.
    fn add_view(&self, py: Python<'_>, operation: Py<PyAny>, call: Py<PyAny>) {
        let mut views = self.views.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner);
        views.insert(operation.as_ptr().addr(), View { call, _operation: operation });
    }

    /// Does a view, or calls the subclass's `_operate(operation, args, kwargs)`; `_operate_uncompiled` where torch's
    /// compiler would else look at what that does.
    ///
    /// Where one of `types`, which are those of arguments, does operations in its own way, it is left to that, after
    /// `_wrapped(operation)`.
    #[pyo3(signature = (operation, types, args, kwargs=None))]
    fn __torch_dispatch__<'py>(
        slf: &Bound<'py, Self>,
        operation: &Bound<'py, PyAny>,
        types: &Bound<'py, PyAny>,
        args: &Bound<'py, PyTuple>,
        kwargs: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        if types.len()? > 0 && !are_plain(types)? {
            slf.call_method1(intern!(py, "_wrapped"), (operation,))?;
            return Ok(py.NotImplemented().into_bound(py));
        }
        let view = {
            let views = slf.get().views.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner);
            views.get(&operation.as_ptr().addr()).map(|view| view.call.clone_ref(py))
        };
        if let Some(view) = view {
            return view.bind(py).call(args, kwargs);
        }
        let operate = if compiles(py)? { intern!(py, "_operate_uncompiled") } else { intern!(py, "_operate") };
        let kwargs = kwargs.map_or_else(|| PyDict::new(py), Clone::clone);
        slf.call_method1(operate, (operation, args, kwargs))
    }
}

/// Whether operations on tensors of all these types are torch's.
fn are_plain(types: &Bound<'_, PyAny>) -> PyResult<bool> {
    static PLAIN: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let py = types.py();
    let name = intern!(py, "__torch_dispatch__");
    let find = || py.import("torch")?.getattr("Tensor")?.getattr(name).map(Bound::unbind);
    let plain = PLAIN.get_or_try_init(py, find)?;
    for of in types.try_iter()? {
        if !of?.getattr(name)?.is(plain) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether torch's compiler may look at what this thread runs in Python. True where torch does not tell.
fn compiles(py: Python<'_>) -> PyResult<bool> {
    static CALLBACK: PyOnceLock<Option<Py<PyAny>>> = PyOnceLock::new();
    let find = || py.import("torch._C._dynamo.eval_frame")?.getattr("get_eval_frame_callback");
    match CALLBACK.get_or_init(py, || find().ok().map(Bound::unbind)) {
        Some(callback) => Ok(!callback.call0(py)?.is_none(py)),
        None => Ok(true),
    }
}
