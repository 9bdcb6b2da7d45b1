//! Runs a template: statements and expressions.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use super::arguments::CallArguments;
use super::functions::{self, Clock, Function};
use super::tree::*;
use super::value::{Dict, JinjaValue};
use super::{CLOSE, Failure, OPEN, RenderResult, fail, methods, operators};

/// Calls inside one another, and statements and operators inside these, at most: bounds the stack.
const DEEPEST: usize = 200;

/// Variables, and where others are looked up.
struct Scope {
    variables: RefCell<Dict>,
    parent: Option<Rc<Scope>>,
}

impl Scope {
    fn inside(parent: &Rc<Scope>) -> Rc<Scope> {
        Rc::new(Scope { variables: RefCell::default(), parent: Some(parent.clone()) })
    }

    fn get(&self, name: &str) -> Option<JinjaValue> {
        if let Some(value) = self.variables.borrow().name(name) {
            return Some(value.clone());
        }
        self.parent.as_ref()?.get(name)
    }

    fn set(&self, name: &str, value: JinjaValue) {
        self.variables.borrow_mut().set_name(name, value);
    }
}

/// A macro, and the variables around it.
pub struct MacroValue {
    pub node: Arc<Macro>,
    scope: Rc<Scope>,
}

/// What `loop` is.
pub struct LoopState {
    items: Vec<JinjaValue>,
    pub index: Cell<usize>,
    changed: RefCell<Option<Vec<JinjaValue>>>,
}

impl LoopState {
    pub fn length(&self) -> usize {
        self.items.len()
    }

    pub fn attribute(self: &Rc<Self>, name: &str) -> Option<JinjaValue> {
        let (i, n) = (self.index.get(), self.items.len());
        Some(match name {
            "index" => JinjaValue::from(i + 1),
            "index0" => JinjaValue::from(i),
            "revindex" => JinjaValue::from(n - i),
            "revindex0" => JinjaValue::from(n - i - 1),
            "first" => JinjaValue::Bool(i == 0),
            "last" => JinjaValue::Bool(i + 1 == n),
            "length" => JinjaValue::from(n),
            "depth" => JinjaValue::from(1),
            "depth0" => JinjaValue::from(0),
            "previtem" => match i.checked_sub(1) {
                Some(i) => self.items[i].clone(),
                None => JinjaValue::undefined("there is no previous item"),
            },
            "nextitem" => match self.items.get(i + 1) {
                Some(item) => item.clone(),
                None => JinjaValue::undefined("there is no next item"),
            },
            "cycle" | "changed" => JinjaValue::Method(Rc::new((JinjaValue::Loop(self.clone()), name.into()))),
            _ => return None,
        })
    }

    /// `loop.cycle(...)` and `loop.changed(...)`
    pub fn call(&self, name: &str, args: CallArguments) -> RenderResult<JinjaValue> {
        if !args.named.is_empty() {
            return fail(format!("loop.{name} takes no named arguments"));
        }
        let values = args.positional;
        if name == "cycle" {
            return match values.len() {
                0 => fail("no items for cycling given"),
                n => Ok(values[self.index.get() % n].clone()),
            };
        }
        let same = |old: &Vec<JinjaValue>| {
            old.len() == values.len() && old.iter().zip(&values).all(|(a, b)| operators::equal(a, b))
        };
        let changed = !self.changed.borrow().as_ref().is_some_and(same);
        if changed {
            *self.changed.borrow_mut() = Some(values);
        }
        Ok(changed.into())
    }
}

enum Flow {
    Next,
    Break,
    Continue,
}

pub struct Machine {
    scope: Rc<Scope>,
    out: String,
    clock: Clock,
    depth: usize,
}

/// The text that a template makes of the variables.
pub fn run(body: &Body, variables: Dict, clock: Clock) -> RenderResult<String> {
    let context = Rc::new(Scope { variables: RefCell::new(variables), parent: None });
    let mut machine = Machine { scope: Scope::inside(&context), out: String::new(), clock, depth: 0 };
    machine.body(body)?;
    Ok(machine.out)
}

impl Machine {
    pub(super) fn deeper<T>(&mut self, run: impl FnOnce(&mut Self) -> RenderResult<T>) -> RenderResult<T> {
        if self.depth >= DEEPEST {
            return fail(
                "blocks, calls or operators are nested too deeply (a macro that calls itself for ever?)",
            );
        }
        self.depth += 1;
        let result = run(self);
        self.depth -= 1;
        result
    }

    /// Runs `run` with other variables in sight.
    fn within<T>(
        &mut self,
        scope: Rc<Scope>,
        run: impl FnOnce(&mut Self) -> RenderResult<T>,
    ) -> RenderResult<T> {
        let outside = std::mem::replace(&mut self.scope, scope);
        let result = self.deeper(run);
        self.scope = outside;
        result
    }

    /// The text that a body writes, with variables of its own.
    fn capture(&mut self, scope: Rc<Scope>, body: &Body) -> RenderResult<String> {
        let outside = std::mem::take(&mut self.out);
        let result = self.within(scope, |m| m.body(body));
        let text = std::mem::replace(&mut self.out, outside);
        result.map(|_| text)
    }

    fn inner_scope(&self) -> Rc<Scope> {
        Scope::inside(&self.scope)
    }

    fn body(&mut self, body: &Body) -> RenderResult<Flow> {
        for statement in body {
            let flow = self.statement(&statement.kind).map_err(|mut e| {
                e.line.get_or_insert(statement.line);
                e
            })?;
            if !matches!(flow, Flow::Next) {
                return Ok(flow);
            }
        }
        Ok(Flow::Next)
    }

    fn statement(&mut self, kind: &NodeKind) -> RenderResult<Flow> {
        match kind {
            NodeKind::Text(text) => self.out += text,
            NodeKind::Print(values) => {
                for value in values {
                    let text = self.eval(value)?.to_text()?;
                    self.out += &text;
                }
            }
            NodeKind::If(branches, otherwise) => {
                for (condition, body) in branches {
                    if self.eval(condition)?.is_true() {
                        return self.deeper(|m| m.body(body));
                    }
                }
                return self.deeper(|m| m.body(otherwise));
            }
            NodeKind::For(node) => return self.for_loop(node),
            NodeKind::Set(target, value) => {
                let value = self.eval(value)?;
                self.assign(target, value)?;
            }
            NodeKind::SetBlock(target, filters, body) => {
                let text = self.capture(self.inner_scope(), body)?;
                let value = self.filtered(text.into(), filters)?;
                self.assign(target, value)?;
            }
            NodeKind::With(values, body) => {
                let scope = self.inner_scope();
                for (target, value) in values {
                    let value = self.eval(value)?;
                    self.within(scope.clone(), |m| m.assign(target, value))?;
                }
                return self.within(scope, |m| m.body(body));
            }
            NodeKind::Macro(node) => {
                let value = MacroValue { node: node.clone(), scope: self.scope.clone() };
                self.scope.set(&node.name, JinjaValue::Macro(Rc::new(value)));
            }
            NodeKind::Call(block) => {
                let caller = MacroValue { node: block.body.clone(), scope: self.scope.clone() };
                let callee = self.eval(&block.call.callee)?;
                let mut args = self.arguments(&block.call.args)?;
                args.named.push((Name::from("caller"), JinjaValue::Macro(Rc::new(caller))));
                let text = self.call(&callee, args)?.to_text()?;
                self.out += &text;
            }
            NodeKind::FilterBlock(filters, body) => {
                let text = self.capture(self.inner_scope(), body)?;
                let text = self.filtered(text.into(), filters)?.to_text()?;
                self.out += &text;
            }
            NodeKind::Generation(body) => {
                let text = self.capture(self.inner_scope(), body)?;
                self.out += &format!("{OPEN}{text}{CLOSE}");
            }
            NodeKind::Break => return Ok(Flow::Break),
            NodeKind::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::Next)
    }

    fn for_loop(&mut self, node: &For) -> RenderResult<Flow> {
        let mut items = self.eval(&node.over)?.items()?;
        if let Some(condition) = &node.condition {
            let mut kept = Vec::with_capacity(items.len());
            for item in items {
                let scope = self.inner_scope();
                let keep = self.within(scope, |m| {
                    m.assign(&node.target, item.clone())?;
                    m.eval(condition)
                })?;
                if keep.is_true() {
                    kept.push(item);
                }
            }
            items = kept;
        }
        // As jinja2 has it, `else` also follows a loop that no round of came to its end.
        let mut completed = false;
        let state = Rc::new(LoopState { items, index: Cell::new(0), changed: RefCell::new(None) });
        for i in 0..state.items.len() {
            state.index.set(i);
            let scope = self.inner_scope();
            scope.set("loop", JinjaValue::Loop(state.clone()));
            let flow = self.within(scope, |m| {
                m.assign(&node.target, state.items[i].clone())?;
                m.body(&node.body)
            })?;
            match flow {
                Flow::Break => break,
                Flow::Continue => {}
                Flow::Next => completed = true,
            }
        }
        if completed {
            return Ok(Flow::Next);
        }
        let scope = self.inner_scope();
        self.within(scope, |m| m.body(&node.otherwise))
    }

    fn assign(&mut self, target: &AssignTarget, value: JinjaValue) -> RenderResult<()> {
        // What is nested deeper could not be taken apart on the stack again.
        if !value.is_within(DEEPEST) {
            return fail(format!("a value has more than {DEEPEST} lists or dicts inside one another"));
        }
        match target {
            AssignTarget::Name(name) => self.scope.set(name, value),
            AssignTarget::Attribute(object, name) => match self.lookup(object) {
                JinjaValue::Namespace(_) if name.starts_with('_') => {
                    return fail(format!(
                        "a namespace cannot hold '{name}', which begins with an underscore"
                    ));
                }
                JinjaValue::Namespace(dict) => dict.borrow_mut().set_name(name, value),
                _ => {
                    return fail(format!(
                        "cannot assign attribute '{name}' on '{object}', which is no namespace"
                    ));
                }
            },
            AssignTarget::Tuple(targets) => {
                if !value.is_iterable() {
                    return fail(format!("cannot unpack non-iterable {} object", value.type_name()));
                }
                let (items, n) = (value.items()?, targets.len());
                if items.len() > n {
                    return fail(format!("too many values to unpack (expected {n})"));
                }
                if items.len() < n {
                    let got = items.len();
                    return fail(format!("not enough values to unpack (expected {n}, got {got})"));
                }
                for (target, item) in targets.iter().zip(items) {
                    self.assign(target, item)?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn lookup(&self, name: &str) -> JinjaValue {
        let value = self.scope.get(name).or_else(|| Function::named(name).map(JinjaValue::Function));
        value.unwrap_or_else(|| JinjaValue::undefined(format!("'{name}' is undefined")))
    }

    pub fn call(&mut self, callee: &JinjaValue, args: CallArguments) -> RenderResult<JinjaValue> {
        match callee {
            JinjaValue::Macro(value) => self.deeper(|m| m.call_macro(value, args)),
            JinjaValue::Method(method) => methods::call(&method.0, &method.1, args),
            JinjaValue::Function(function) => functions::call(*function, args, self.clock),
            JinjaValue::Joiner(state) => {
                args.none("a joiner")?;
                Ok(if state.1.replace(true) { state.0.clone() } else { "".into() })
            }
            JinjaValue::Undefined(why) => Err(Failure::new(&**why)),
            JinjaValue::Loop(_) => fail("a recursive loop is not supported; write a macro"),
            _ => fail(format!("'{}' object is not callable", callee.type_name())),
        }
    }

    fn call_macro(&mut self, value: &MacroValue, args: CallArguments) -> RenderResult<JinjaValue> {
        let node = &value.node;
        let scope = Scope::inside(&value.scope);
        let CallArguments { positional, mut named } = args;
        let mut take = |name: &str| named.iter().position(|(n, _)| &**n == name).map(|i| named.remove(i).1);
        let first_default = node.params.len() - node.defaults.len();
        let count = positional.len();
        let mut positional = positional.into_iter();
        let mut given = Vec::new();
        for param in &node.params {
            given.push(positional.next().or_else(|| take(param)));
        }
        if node.caller && !node.params.iter().any(|p| &**p == "caller") {
            scope.set("caller", take("caller").unwrap_or_else(|| JinjaValue::undefined("No caller defined")));
        }
        let rest: Vec<JinjaValue> = positional.collect();
        if node.varargs {
            scope.set("varargs", JinjaValue::tuple(rest));
        } else if !rest.is_empty() {
            let most = node.params.len();
            return fail(format!(
                "macro '{}' takes not more than {most} argument(s), not {count}",
                node.name
            ));
        }
        if node.kwargs {
            let items = named.into_iter().map(|(name, value)| (JinjaValue::from(&name), value)).collect();
            scope.set("kwargs", JinjaValue::Dict(Rc::new(Dict { items })));
        } else if let Some((name, _)) = named.first() {
            return fail(format!("macro '{}' takes no keyword argument '{name}'", node.name));
        }
        let outside = std::mem::replace(&mut self.scope, scope.clone());
        let bound = given.into_iter().enumerate().try_for_each(|(i, given)| {
            let value = match (given, i.checked_sub(first_default)) {
                (Some(value), _) => value,
                (None, Some(default)) => self.eval(&node.defaults[default])?,
                (None, None) => {
                    JinjaValue::undefined(format!("parameter '{}' was not provided", node.params[i]))
                }
            };
            scope.set(&node.params[i], value);
            Ok(())
        });
        self.scope = outside;
        bound?;
        self.capture(scope, &node.body).map(JinjaValue::from)
    }
}
