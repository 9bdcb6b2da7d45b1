//! Runs a template: statements and expressions.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use super::arguments::Args;
use super::functions::{self, Clock, Function};
use super::tree::*;
use super::value::{Dict, Value};
use super::{CLOSE, Failure, OPEN, Outcome, fail, methods, operators};

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

    fn get(&self, name: &str) -> Option<Value> {
        if let Some(value) = self.variables.borrow().name(name) {
            return Some(value.clone());
        }
        self.parent.as_ref()?.get(name)
    }

    fn set(&self, name: &str, value: Value) {
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
    items: Vec<Value>,
    pub index: Cell<usize>,
    changed: RefCell<Option<Vec<Value>>>,
}

impl LoopState {
    pub fn length(&self) -> usize {
        self.items.len()
    }

    pub fn attribute(self: &Rc<Self>, name: &str) -> Option<Value> {
        let (i, n) = (self.index.get(), self.items.len());
        Some(match name {
            "index" => Value::from(i + 1),
            "index0" => Value::from(i),
            "revindex" => Value::from(n - i),
            "revindex0" => Value::from(n - i - 1),
            "first" => Value::Bool(i == 0),
            "last" => Value::Bool(i + 1 == n),
            "length" => Value::from(n),
            "depth" => Value::from(1),
            "depth0" => Value::from(0),
            "previtem" => match i.checked_sub(1) {
                Some(i) => self.items[i].clone(),
                None => Value::undefined("there is no previous item"),
            },
            "nextitem" => match self.items.get(i + 1) {
                Some(item) => item.clone(),
                None => Value::undefined("there is no next item"),
            },
            "cycle" | "changed" => Value::Method(Rc::new((Value::Loop(self.clone()), name.into()))),
            _ => return None,
        })
    }

    /// `loop.cycle(...)` and `loop.changed(...)`
    pub fn call(&self, name: &str, args: Args) -> Outcome<Value> {
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
        let same = |old: &Vec<Value>| {
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
pub fn run(body: &Body, variables: Dict, clock: Clock) -> Outcome<String> {
    let context = Rc::new(Scope { variables: RefCell::new(variables), parent: None });
    let mut machine = Machine { scope: Scope::inside(&context), out: String::new(), clock, depth: 0 };
    machine.body(body)?;
    Ok(machine.out)
}

impl Machine {
    pub(super) fn deeper<T>(&mut self, run: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<T> {
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
    fn within<T>(&mut self, scope: Rc<Scope>, run: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<T> {
        let outside = std::mem::replace(&mut self.scope, scope);
        let result = self.deeper(run);
        self.scope = outside;
        result
    }

    /// The text that a body writes, with variables of its own.
    fn capture(&mut self, scope: Rc<Scope>, body: &Body) -> Outcome<String> {
        let outside = std::mem::take(&mut self.out);
        let result = self.within(scope, |m| m.body(body));
        let text = std::mem::replace(&mut self.out, outside);
        result.map(|_| text)
    }

    fn inner_scope(&self) -> Rc<Scope> {
        Scope::inside(&self.scope)
    }

    fn body(&mut self, body: &Body) -> Outcome<Flow> {
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

    fn statement(&mut self, kind: &Kind) -> Outcome<Flow> {
        match kind {
            Kind::Text(text) => self.out += text,
            Kind::Print(values) => {
                for value in values {
                    let text = self.eval(value)?.to_text()?;
                    self.out += &text;
                }
            }
            Kind::If(branches, otherwise) => {
                for (condition, body) in branches {
                    if self.eval(condition)?.is_true() {
                        return self.deeper(|m| m.body(body));
                    }
                }
                return self.deeper(|m| m.body(otherwise));
            }
            Kind::For(node) => return self.for_loop(node),
            Kind::Set(target, value) => {
                let value = self.eval(value)?;
                self.assign(target, value)?;
            }
            Kind::SetBlock(target, filters, body) => {
                let text = self.capture(self.inner_scope(), body)?;
                let value = self.filtered(text.into(), filters)?;
                self.assign(target, value)?;
            }
            Kind::With(values, body) => {
                let scope = self.inner_scope();
                for (target, value) in values {
                    let value = self.eval(value)?;
                    self.within(scope.clone(), |m| m.assign(target, value))?;
                }
                return self.within(scope, |m| m.body(body));
            }
            Kind::Macro(node) => {
                let value = MacroValue { node: node.clone(), scope: self.scope.clone() };
                self.scope.set(&node.name, Value::Macro(Rc::new(value)));
            }
            Kind::Call(block) => {
                let caller = MacroValue { node: block.body.clone(), scope: self.scope.clone() };
                let callee = self.eval(&block.call.callee)?;
                let mut args = self.arguments(&block.call.args)?;
                args.named.push((Name::from("caller"), Value::Macro(Rc::new(caller))));
                let text = self.call(&callee, args)?.to_text()?;
                self.out += &text;
            }
            Kind::FilterBlock(filters, body) => {
                let text = self.capture(self.inner_scope(), body)?;
                let text = self.filtered(text.into(), filters)?.to_text()?;
                self.out += &text;
            }
            Kind::Generation(body) => {
                let text = self.capture(self.inner_scope(), body)?;
                self.out += &format!("{OPEN}{text}{CLOSE}");
            }
            Kind::Break => return Ok(Flow::Break),
            Kind::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::Next)
    }

    fn for_loop(&mut self, node: &For) -> Outcome<Flow> {
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
            scope.set("loop", Value::Loop(state.clone()));
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

    fn assign(&mut self, target: &Target, value: Value) -> Outcome<()> {
        // What is nested deeper could not be taken apart on the stack again.
        if !value.is_within(DEEPEST) {
            return fail(format!("a value has more than {DEEPEST} lists or dicts inside one another"));
        }
        match target {
            Target::Name(name) => self.scope.set(name, value),
            Target::Attribute(object, name) => match self.lookup(object) {
                Value::Namespace(_) if name.starts_with('_') => {
                    return fail(format!(
                        "a namespace cannot hold '{name}', which begins with an underscore"
                    ));
                }
                Value::Namespace(dict) => dict.borrow_mut().set_name(name, value),
                _ => {
                    return fail(format!(
                        "cannot assign attribute '{name}' on '{object}', which is no namespace"
                    ));
                }
            },
            Target::Tuple(targets) => {
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

    pub(super) fn lookup(&self, name: &str) -> Value {
        let value = self.scope.get(name).or_else(|| Function::named(name).map(Value::Function));
        value.unwrap_or_else(|| Value::undefined(format!("'{name}' is undefined")))
    }

    pub fn call(&mut self, callee: &Value, args: Args) -> Outcome<Value> {
        match callee {
            Value::Macro(value) => self.deeper(|m| m.call_macro(value, args)),
            Value::Method(method) => methods::call(&method.0, &method.1, args),
            Value::Function(function) => functions::call(*function, args, self.clock),
            Value::Joiner(state) => {
                args.none("a joiner")?;
                Ok(if state.1.replace(true) { state.0.clone() } else { "".into() })
            }
            Value::Undefined(why) => Err(Failure::new(&**why)),
            Value::Loop(_) => fail("a recursive loop is not supported; write a macro"),
            _ => fail(format!("'{}' object is not callable", callee.type_name())),
        }
    }

    fn call_macro(&mut self, value: &MacroValue, args: Args) -> Outcome<Value> {
        let node = &value.node;
        let scope = Scope::inside(&value.scope);
        let Args { positional, mut named } = args;
        let mut take = |name: &str| named.iter().position(|(n, _)| &**n == name).map(|i| named.remove(i).1);
        let first_default = node.params.len() - node.defaults.len();
        let count = positional.len();
        let mut positional = positional.into_iter();
        let mut given = Vec::new();
        for param in &node.params {
            given.push(positional.next().or_else(|| take(param)));
        }
        if node.caller && !node.params.iter().any(|p| &**p == "caller") {
            scope.set("caller", take("caller").unwrap_or_else(|| Value::undefined("No caller defined")));
        }
        let rest: Vec<Value> = positional.collect();
        if node.varargs {
            scope.set("varargs", Value::tuple(rest));
        } else if !rest.is_empty() {
            let most = node.params.len();
            return fail(format!(
                "macro '{}' takes not more than {most} argument(s), not {count}",
                node.name
            ));
        }
        if node.kwargs {
            let items = named.into_iter().map(|(name, value)| (Value::from(&name), value)).collect();
            scope.set("kwargs", Value::Dict(Rc::new(Dict { items })));
        } else if let Some((name, _)) = named.first() {
            return fail(format!("macro '{}' takes no keyword argument '{name}'", node.name));
        }
        let outside = std::mem::replace(&mut self.scope, scope.clone());
        let bound = given.into_iter().enumerate().try_for_each(|(i, given)| {
            let value = match (given, i.checked_sub(first_default)) {
                (Some(value), _) => value,
                (None, Some(default)) => self.eval(&node.defaults[default])?,
                (None, None) => Value::undefined(format!("parameter '{}' was not provided", node.params[i])),
            };
            scope.set(&node.params[i], value);
            Ok(())
        });
        self.scope = outside;
        bound?;
        self.capture(scope, &node.body).map(Value::from)
    }
}
